//! The state of the agent on one screen.

use std::fmt::{self, Write};

use serde::{Deserialize, Serialize};

use super::text::Style;

/// The state of the agent. Its JSON is an interface; fields may be added.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Status {
    pub api_version: String,
    pub node: String,
    /// The version of nftlet.
    pub version: String,
    /// The release of the kernel.
    pub kernel: String,
    pub up_seconds: u64,
    pub healthy: bool,
    /// Why it is not healthy.
    pub reasons: Vec<String>,
    /// None if the objects come from files.
    pub api_server: Option<ApiServer>,
    pub rules: Rules,
    /// None if the main loop does not answer.
    pub services: Option<Services>,
    /// None if the main loop does not answer.
    pub policies: Option<Policies>,
    /// None where connections are not tracked.
    pub conntrack: Option<Conntrack>,
    pub settings: Vec<Setting>,
    /// The kernel modules that must be loaded, or be part of the kernel.
    pub modules: Vec<String>,
    /// Packets that policies dropped in the last five minutes.
    pub drops: Vec<Drop>,
    /// What is wrong but does not make it unhealthy.
    pub warnings: Vec<String>,
}

/// The API server and the watches.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ApiServer {
    pub url: String,
    /// The kinds that are watched, with the fault of each that has one.
    pub watches: Vec<Watch>,
    /// The time since the last object arrived.
    pub last_event_seconds: Option<u64>,
}

/// The watch of a kind.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Watch {
    pub kind: String,
    pub fault: Option<String>,
}

/// The rules in the kernel.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Rules {
    /// When the last change took effect, as in RFC 3339; none while rules differ from the objects.
    pub in_sync_since: Option<String>,
    /// Changes that wait to be written; none if the main loop does not answer.
    pub pending: Option<usize>,
    /// When the kernel's tables were last compared with the wanted rules.
    pub last_audit: Option<String>,
}

/// The services.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Services {
    pub total: usize,
    pub frontends: usize,
    /// Those that get traffic.
    pub endpoints: usize,
    pub without_endpoints: usize,
    pub refused: usize,
}

/// The policies.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Policies {
    pub total: usize,
    /// Pods of this node that a policy isolates.
    pub isolated_pods: usize,
    /// Those that deny nothing and only report what they would deny.
    pub audited: usize,
    pub refused: usize,
    pub in_force: bool,
}

/// Connection tracking.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Conntrack {
    pub used: u64,
    pub max: u64,
}

/// A kernel parameter.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Setting {
    pub name: String,
    pub value: String,
    /// The value that nftlet needs, if it is another one.
    pub wanted: Option<String>,
}

/// Packets that policies dropped.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Drop {
    pub pod: String,
    pub direction: String,
    pub packets: u64,
}

/// The share of tracked connections, in percent, above which there is a warning.
const FULL: u64 = 90;

impl Status {
    /// Adds warnings about values that are near a limit or not as needed.
    pub(crate) fn judge(&mut self) {
        if let Some(Conntrack { used, max }) = self.conntrack
            && used.saturating_mul(100) >= max.saturating_mul(FULL)
            && max > 0
        {
            self.warnings.push(format!(
                "{used} of {max} connections are tracked; new ones are dropped at the limit: raise \
                 --conntrack-max-per-core"
            ));
        }
        for setting in &self.settings {
            if let Some(wanted) = &setting.wanted {
                self.warnings.push(format!(
                    "the kernel parameter {} is {}; set it to {wanted}",
                    setting.name, setting.value
                ));
            }
        }
        let faults = self.api_server.iter().flat_map(|server| &server.watches);
        for watch in faults {
            if let Some(fault) = &watch.fault {
                self.warnings.push(format!("{}: {fault}", watch.kind));
            }
        }
        if let Some(refused) = self.services.as_ref().map(|it| it.refused)
            && refused > 0
        {
            self.warnings.push(format!(
                "{refused} services have no rules because of a fault; see nftlet services --refused"
            ));
        }
        if let Some(refused) = self.policies.as_ref().map(|it| it.refused)
            && refused > 0
        {
            self.warnings.push(format!(
                "the kernel refused {refused} policies, which allow nothing; see nftlet policies"
            ));
        }
    }
}

/// Writes the state, what is wrong first.
pub(crate) fn status(status: &Status, style: Style, out: &mut impl Write) -> fmt::Result {
    let paint = |text: &str, colour: u8| {
        if style.colour {
            format!("\x1b[{colour}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    };
    let word = if status.healthy && status.warnings.is_empty() {
        paint("HEALTHY", 32)
    } else if status.healthy {
        paint("HEALTHY, with warnings", 33)
    } else {
        paint("DEGRADED", 31)
    };
    writeln!(out, "{} {word}", status.node)?;
    for reason in &status.reasons {
        writeln!(out, "  {} {reason}", paint("!", 31))?;
    }
    for warning in &status.warnings {
        writeln!(out, "  {} {warning}", paint("-", 33))?;
    }
    writeln!(out)?;
    let mut row = |name: &str, text: &str| writeln!(out, "  {name:<13} {text}");
    row(
        "nftlet",
        &format!(
            "{}, up {}, Linux {}",
            status.version,
            duration(status.up_seconds),
            status.kernel
        ),
    )?;
    match &status.api_server {
        Some(server) => {
            let last = server
                .last_event_seconds
                .map_or_else(String::new, |seconds| {
                    format!(", last object {} ago", duration(seconds))
                });
            let sound = server
                .watches
                .iter()
                .filter(|it| it.fault.is_none())
                .count();
            let all = server.watches.len();
            row(
                "API server",
                &format!("{}, {sound} of {all} watches{last}", server.url),
            )?;
        }
        None => row("objects", "from files")?,
    }
    let rules = &status.rules;
    let since = match (&rules.in_sync_since, rules.pending) {
        (Some(since), _) => format!("in step since {since}"),
        (None, Some(_)) => "not in step".to_owned(),
        (None, None) => "not known".to_owned(),
    };
    let pending = rules.pending.map_or_else(String::new, |pending| {
        format!(", {pending} changes waiting")
    });
    let audit = rules
        .last_audit
        .as_ref()
        .map_or_else(String::new, |at| format!(", compared at {at}"));
    row("rules", &format!("{since}{pending}{audit}"))?;
    if let Some(services) = &status.services {
        row(
            "services",
            &format!(
                "{}: {} frontends, {} endpoints, {} without endpoints, {} refused",
                services.total,
                services.frontends,
                services.endpoints,
                services.without_endpoints,
                services.refused
            ),
        )?;
    }
    if let Some(policies) = &status.policies {
        let in_force = if policies.in_force {
            "in force"
        } else {
            "NOT in force"
        };
        let audited = match policies.audited {
            0 => String::new(),
            audited => format!(", {audited} audited (see nftlet audit)"),
        };
        row(
            "policies",
            &format!(
                "{}, {in_force}: {} pods of this node isolated, {} refused{audited}",
                policies.total, policies.isolated_pods, policies.refused
            ),
        )?;
    }
    if let Some(Conntrack { used, max }) = &status.conntrack {
        let percent = used
            .saturating_mul(100)
            .checked_div(*max)
            .unwrap_or_default();
        row(
            "conntrack",
            &format!("{used} of {max} connections ({percent} %)"),
        )?;
    }
    let settings = status.settings.iter();
    let settings: Vec<String> = settings
        .map(|setting| format!("{}={}", setting.name, setting.value))
        .collect();
    if !settings.is_empty() {
        row("kernel", &settings.join(" "))?;
    }
    if !status.modules.is_empty() {
        row("modules", &status.modules.join(" "))?;
    }
    for (index, drop) in status.drops.iter().enumerate() {
        let name = if index == 0 { "drops (5 min)" } else { "" };
        row(
            name,
            &format!("{} {}: {} packets", drop.pod, drop.direction, drop.packets),
        )?;
    }
    Ok(())
}

/// Returns a duration in its two largest units.
fn duration(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, minutes) => format!("{minutes}m{}s", seconds % 60),
        (0, hours, minutes) => format!("{hours}h{minutes}m"),
        (days, hours, _) => format!("{days}d{hours}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(of: &Status) -> String {
        let mut text = String::new();
        status(of, Style::default(), &mut text).unwrap();
        text
    }

    #[test]
    fn what_is_wrong_comes_first_with_its_hint() {
        let mut of = Status {
            node: "node-1".into(),
            healthy: false,
            reasons: vec!["the kernel refused the rules".into()],
            conntrack: Some(Conntrack { used: 95, max: 100 }),
            settings: vec![Setting {
                name: "net.ipv4.ip_forward".into(),
                value: "0".into(),
                wanted: Some("1".into()),
            }],
            ..Status::default()
        };
        of.services = Some(Services {
            refused: 2,
            ..Services::default()
        });
        of.judge();
        let text = shown(&of);
        let first: Vec<&str> = text.lines().take(5).collect();
        assert_eq!(
            first,
            [
                "node-1 DEGRADED",
                "  ! the kernel refused the rules",
                "  - 95 of 100 connections are tracked; new ones are dropped at the limit: raise \
                 --conntrack-max-per-core",
                "  - the kernel parameter net.ipv4.ip_forward is 0; set it to 1",
                "  - 2 services have no rules because of a fault; see nftlet services --refused",
            ]
        );
    }

    #[test]
    fn a_healthy_node_has_one_word() {
        let mut of = Status {
            node: "node-1".into(),
            healthy: true,
            up_seconds: 93_784,
            conntrack: Some(Conntrack { used: 1, max: 100 }),
            ..Status::default()
        };
        of.judge();
        let text = shown(&of);
        assert!(text.starts_with("node-1 HEALTHY\n\n"), "{text}");
        assert!(text.contains("up 1d2h"), "{text}");
        let json = serde_json::to_string(&of).unwrap();
        assert_eq!(serde_json::from_str::<Status>(&json).unwrap(), of);
    }

    #[test]
    fn the_document_shows_this_screen() {
        let text = |text: &str| Some(text.to_owned());
        let mut of = Status {
            node: "node-1".into(),
            version: "0.2.0".into(),
            kernel: "6.12.0".into(),
            up_seconds: 266_400,
            healthy: true,
            api_server: Some(ApiServer {
                url: "https://10.0.0.1:6443".into(),
                watches: vec![Watch::default(); 7],
                last_event_seconds: Some(4),
            }),
            rules: Rules {
                in_sync_since: text("2026-11-30T03:00:00Z"),
                pending: Some(0),
                last_audit: text("2026-11-30T02:00:00Z"),
            },
            services: Some(Services {
                total: 120,
                frontends: 340,
                endpoints: 900,
                without_endpoints: 2,
                refused: 0,
            }),
            policies: Some(Policies {
                total: 14,
                isolated_pods: 23,
                audited: 1,
                refused: 0,
                in_force: true,
            }),
            conntrack: Some(Conntrack { used: 95, max: 100 }),
            settings: vec![Setting {
                name: "net.ipv4.ip_forward".into(),
                value: "1".into(),
                wanted: None,
            }],
            modules:
                "nf_conntrack_netlink nf_tables nft_chain_nat nft_counter nft_ct nft_fib_ipv4 \
                      nft_fib_ipv6 nft_limit nft_masq nft_nat nft_numgen nft_reject_ipv4 \
                      nft_reject_ipv6"
                    .split(' ')
                    .map(str::to_owned)
                    .collect(),
            drops: vec![Drop {
                pod: "shop/web-0".into(),
                direction: "ingress".into(),
                packets: 12,
            }],
            ..Status::default()
        };
        of.judge();
        let document = include_str!("../../docs/insight.md");
        let screen = format!("```text\n{}```", shown(&of));
        assert!(document.contains(&screen), "{screen}");
    }

    #[test]
    fn what_is_not_known_is_not_shown_as_zero() {
        let text = shown(&Status::default());
        assert!(text.starts_with(" DEGRADED\n"), "{text}");
        assert!(text.contains("rules         not known\n"), "{text}");
        for row in ["services", "policies", "changes waiting"] {
            assert!(!text.contains(row), "{text}");
        }
    }

    /// The fields are an interface: they may be added to, but not renamed.
    #[test]
    fn the_json_has_these_fields() {
        let of = Status {
            api_server: Some(ApiServer {
                watches: vec![Watch::default()],
                ..ApiServer::default()
            }),
            services: Some(Services::default()),
            policies: Some(Policies::default()),
            conntrack: Some(Conntrack::default()),
            settings: vec![Setting::default()],
            drops: vec![Drop::default()],
            ..Status::default()
        };
        let json = serde_json::to_value(&of).unwrap();
        let names = |path: &str| -> Vec<String> {
            let fields = json.pointer(path).and_then(|it| it.as_object());
            let mut names: Vec<String> = fields.unwrap().keys().cloned().collect();
            names.sort();
            names
        };
        for (path, wanted) in [
            (
                "",
                "apiServer apiVersion conntrack drops healthy kernel modules node policies reasons \
                 rules services settings upSeconds version warnings",
            ),
            ("/apiServer", "lastEventSeconds url watches"),
            ("/apiServer/watches/0", "fault kind"),
            ("/rules", "inSyncSince lastAudit pending"),
            (
                "/services",
                "endpoints frontends refused total withoutEndpoints",
            ),
            ("/policies", "audited inForce isolatedPods refused total"),
            ("/conntrack", "max used"),
            ("/settings/0", "name value wanted"),
            ("/drops/0", "direction packets pod"),
        ] {
            assert_eq!(names(path).join(" "), wanted, "{path}");
        }
    }

    #[test]
    fn durations_have_two_units() {
        let texts = [0, 59, 61, 3_600, 86_400 * 3].map(duration);
        assert_eq!(texts, ["0s", "59s", "1m1s", "1h0m", "3d0h"]);
    }
}
