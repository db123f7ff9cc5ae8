//! What audited policies would deny, as the agent has seen it.

use std::fmt::{self, Write};

use serde::{Deserialize, Serialize};

use super::text::{Style, table};

/// What audited policies would deny. Its JSON is an interface; fields may be added.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct AuditReport {
    pub api_version: String,
    /// The pairs that were seen in the log, which is limited.
    pub audit: Vec<AuditRow>,
    /// The counts of the kernel, of the policies that are audited now; none if they cannot be read.
    pub counts: Option<Vec<AuditCount>>,
}

/// Two ends between which a policy would deny connections to a port.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct AuditRow {
    /// Namespace and name.
    pub policy: String,
    pub direction: String,
    /// A pod, or an address.
    pub from: String,
    pub to: String,
    pub port: Option<u16>,
    pub protocol: String,
    /// At least so many.
    pub connections: u64,
    /// When the first and the last were seen, as in RFC 3339.
    pub first: String,
    pub last: String,
}

/// The packets that a policy would deny for a pod.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct AuditCount {
    /// Namespace and name.
    pub policy: String,
    pub direction: String,
    pub pod: String,
    pub packets: u64,
}

/// Writes the tables of pairs and of counts.
pub(crate) fn audit(report: &AuditReport, style: Style, out: &mut impl Write) -> fmt::Result {
    if report.audit.is_empty() {
        writeln!(
            out,
            "No connection was seen that an audited policy would deny."
        )?;
    } else {
        let header = [
            "POLICY",
            "DIRECTION",
            "FROM",
            "TO",
            "PORT",
            "CONNECTIONS (AT LEAST)",
            "FIRST",
            "LAST",
        ];
        let mut cells: Vec<Vec<String>> = vec![header.map(str::to_owned).into()];
        cells.extend(report.audit.iter().map(|row| {
            let port = row.port.map_or_else(String::new, |port| format!("{port}/"));
            vec![
                row.policy.clone(),
                row.direction.clone(),
                row.from.clone(),
                row.to.clone(),
                format!("{port}{}", row.protocol),
                row.connections.to_string(),
                row.first.clone(),
                row.last.clone(),
            ]
        }));
        table(&cells, style, |_| None, out)?;
    }
    let Some(counts) = &report.counts else {
        return writeln!(
            out,
            "\nThe kernel's counts cannot be read; see the log of the agent."
        );
    };
    if counts.is_empty() {
        return writeln!(out, "\nNo pod of this node has an audited policy.");
    }
    writeln!(out)?;
    let header = ["POLICY", "DIRECTION", "POD", "PACKETS"];
    let mut cells: Vec<Vec<String>> = vec![header.map(str::to_owned).into()];
    cells.extend(counts.iter().map(|count| {
        vec![
            count.policy.clone(),
            count.direction.clone(),
            count.pod.clone(),
            count.packets.to_string(),
        ]
    }));
    table(&cells, style, |_| None, out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(report: &AuditReport) -> String {
        let mut text = String::new();
        audit(report, Style::default(), &mut text).unwrap();
        text
    }

    #[test]
    fn the_document_shows_the_tables() {
        let row = |from: &str, to: &str, port, connections| AuditRow {
            policy: "shop/deny-web".to_owned(),
            direction: "ingress".to_owned(),
            from: from.to_owned(),
            to: to.to_owned(),
            port: Some(port),
            protocol: "TCP".to_owned(),
            connections,
            first: "2026-11-30T03:00:00Z".to_owned(),
            last: "2026-11-30T09:12:44Z".to_owned(),
        };
        let text = shown(&AuditReport {
            audit: vec![
                row("198.51.100.7", "shop/web-0", 8080, 1),
                row("shop/cart-7c9", "shop/web-0", 8080, 214),
            ],
            counts: Some(vec![AuditCount {
                policy: "shop/deny-web".to_owned(),
                direction: "ingress".to_owned(),
                pod: "shop/web-0".to_owned(),
                packets: 241,
            }]),
            ..AuditReport::default()
        });
        let document = include_str!("../../docs/insight.md");
        assert!(document.contains(&format!("```text\n{text}```")), "{text}");
    }

    #[test]
    fn nothing_is_said_in_words() {
        let mut report = AuditReport::default();
        let text = shown(&report);
        assert!(
            text.contains("No connection was seen") && text.contains("cannot be read"),
            "{text}"
        );
        report.counts = Some(Vec::new());
        assert!(shown(&report).ends_with("No pod of this node has an audited policy.\n"));
    }
}
