//! What audited policies would deny.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use hyper::StatusCode;

use super::{AgentPages, failed, ok};
use crate::insight::API_VERSION;
use crate::insight::audit::{AuditCount, AuditReport, AuditRow};
use crate::serve::health::in_seconds;
use crate::serve::socket::SocketAnswer;

impl AgentPages {
    pub(super) async fn audited(&self, query: &HashMap<String, String>) -> SocketAnswer {
        let Some(audit) = self.audit.clone() else {
            let message = "the agent audits no policies; start it with --audit-annotations=on";
            return failed(StatusCode::NOT_FOUND, message);
        };
        let seconds = query.get("since").and_then(|seconds| seconds.parse().ok());
        let since = seconds.map(Duration::from_secs);
        let since = since.and_then(|since| SystemTime::now().checked_sub(since));
        let pairs = audit.log.since(since.unwrap_or(SystemTime::UNIX_EPOCH));
        let rows = pairs.into_iter().map(|(pair, seen)| AuditRow {
            policy: pair.policy.to_string(),
            direction: pair.direction.as_str().to_owned(),
            from: pair.from,
            to: pair.to,
            port: pair.port,
            protocol: pair.protocol,
            connections: seen.connections,
            first: in_seconds(seen.first).unwrap_or_default(),
            last: in_seconds(seen.last).unwrap_or_default(),
        });
        let rows = rows.collect();
        let counts = tokio::task::spawn_blocking(move || audit.counters.read());
        let counts = counts.await.ok().flatten();
        let counts = counts.map(|counts| {
            let count = counts.into_iter();
            let count = count.map(|((policy, pod, direction), packets)| AuditCount {
                policy: policy.to_string(),
                direction: direction.as_str().to_owned(),
                pod: pod.to_string(),
                packets,
            });
            count.collect()
        });
        let report = AuditReport {
            api_version: API_VERSION.to_owned(),
            audit: rows,
            counts,
        };
        match serde_json::to_value(&report) {
            Ok(report) => ok(&report),
            Err(error) => failed(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        }
    }
}
