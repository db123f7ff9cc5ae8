//! What a configuration file says without effect.
//!
//! kubeadm and kube-proxy write every field, so a field that holds zero or kube-proxy's default
//! is no wish and worth no words.

use std::time::Duration;

use serde_json::Value;

use super::wire::{Flag, Period, Wire};

/// What kube-proxy writes where nobody asked for anything, beside zero values.
const DEFAULTS: [(&str, &str); 7] = [
    ("iptables.localhostNodePorts", "true"),
    ("iptables.masqueradeBit", "14"),
    ("iptables.minSyncPeriod", "1s"),
    ("iptables.syncPeriod", "30s"),
    ("ipvs.minSyncPeriod", "1s"),
    ("ipvs.syncPeriod", "30s"),
    ("ipvs.scheduler", "rr"),
];

/// One line for each sort of field that is set and has no effect.
pub(super) fn notes(wire: &Wire, unknown: &[String]) -> Vec<String> {
    let mut notes = Vec::new();
    let mut note = |fields: &[String], what: &str| {
        if !fields.is_empty() {
            notes.push(format!("{what}: {}", fields.join(", ")));
        }
    };
    note(unknown, "fields that KubeProxyConfiguration does not have");
    let mut others = Vec::new();
    for (name, value) in [
        ("iptables", &wire.iptables),
        ("ipvs", &wire.ipvs),
        ("winkernel", &wire.winkernel),
        ("windowsRunAsService", &wire.windows_run_as_service),
    ] {
        if let Some(value) = value {
            wishes(name, value, &mut others);
        }
    }
    note(
        &others,
        "fields of other modes have no effect here; what there is of them is under nftables",
    );
    note(&without_use(wire), "fields that nftlet has no use for");
    notes
}

/// Collects the paths of values that somebody must have chosen.
fn wishes(path: &str, value: &Value, found: &mut Vec<String>) {
    if let Value::Object(fields) = value {
        for (name, value) in fields {
            wishes(&format!("{path}.{name}"), value, found);
        }
        return;
    }
    let text = match value {
        Value::Null => return,
        Value::Array(items) if items.is_empty() => return,
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let zero = matches!(text.trim(), "" | "0" | "false" | "0s" | "0m0s" | "0h0m0s");
    if !zero && !DEFAULTS.contains(&(path, text.as_str())) {
        found.push(path.to_owned());
    }
}

fn without_use(wire: &Wire) -> Vec<String> {
    let mut found = Vec::new();
    let mut add = |field: &str, set: bool| {
        if set {
            found.push(field.to_owned());
        }
    };
    let is = |flag: Option<Flag>| flag.is_some_and(|flag| flag.0);
    let differs = |period: Option<Period>, usual: u64| {
        let period = period.and_then(Period::set);
        period.is_some_and(|period| period != Duration::from_secs(usual))
    };
    // Watches are resumed and not repeated.
    add("configSyncPeriod", differs(wire.config_sync_period, 900));
    add("enableProfiling", is(wire.enable_profiling));
    for (name, value) in [
        ("featureGates", &wire.feature_gates),
        ("logging.vmodule", &wire.logging.vmodule),
    ] {
        let empty = match value {
            None | Some(Value::Null) => true,
            Some(Value::Object(fields)) => fields.is_empty(),
            Some(Value::Array(items)) => items.is_empty(),
            Some(_) => false,
        };
        add(name, !empty);
    }
    // Changes are written as they come.
    add(
        "nftables.minSyncPeriod",
        differs(wire.nftables.min_sync_period, 1),
    );
    add("portRange", wire.port_range.is_some());
    let hidden = &wire.show_hidden_metrics_for_version;
    add("showHiddenMetricsForVersion", hidden.is_some());
    found
}
