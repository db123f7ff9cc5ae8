//! What a configuration file says without effect.
//!
//! kubeadm and kube-proxy write every field, so a field that holds zero or kube-proxy's default
//! is no wish and worth no words.

use std::time::Duration;

use serde_json::Value;

use super::wire::{Flag, Period, Wire};

/// One line for each sort of field that is set and has no effect.
pub(super) fn notes(wire: &Wire, unknown: &[String]) -> Vec<String> {
    let mode = wire.mode.unwrap_or_default();
    let mut notes: Vec<String> = mode.note().into_iter().collect();
    let mut note = |fields: &[String], what: &str| {
        if !fields.is_empty() {
            notes.push(format!("{what}: {}", fields.join(", ")));
        }
    };
    note(unknown, "fields that KubeProxyConfiguration does not have");
    let mut others = of_other_modes(wire);
    for (name, value) in [
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
    if !matches!(text.trim(), "" | "0" | "false") {
        found.push(path.to_owned());
    }
}

/// What of the other modes on Linux holds neither zero nor kube-proxy's default.
fn of_other_modes(wire: &Wire) -> Vec<String> {
    let (iptables, ipvs) = (&wire.iptables, &wire.ipvs);
    let bit = iptables.masquerade_bit.map(|bit| bit.0);
    let excluded = ipvs.exclude_cidrs.as_ref();
    let scheduler = ipvs.scheduler.as_deref();
    let fields = [
        ("iptables.masqueradeAll", is(iptables.masquerade_all)),
        (
            "iptables.masqueradeBit",
            bit.is_some_and(|bit| ![0, 14].contains(&bit)),
        ),
        (
            "iptables.minSyncPeriod",
            differs(iptables.min_sync_period, 1),
        ),
        ("iptables.syncPeriod", differs(iptables.sync_period, 30)),
        (
            "ipvs.excludeCIDRs",
            excluded.is_some_and(|ranges| !ranges.is_empty()),
        ),
        ("ipvs.minSyncPeriod", differs(ipvs.min_sync_period, 1)),
        ("ipvs.scheduler", scheduler.is_some_and(|it| it != "rr")),
        ("ipvs.strictARP", is(ipvs.strict_arp)),
        ("ipvs.syncPeriod", differs(ipvs.sync_period, 30)),
        ("ipvs.tcpFinTimeout", differs(ipvs.tcp_fin_timeout, 0)),
        ("ipvs.tcpTimeout", differs(ipvs.tcp_timeout, 0)),
        ("ipvs.udpTimeout", differs(ipvs.udp_timeout, 0)),
    ];
    let set = fields.into_iter().filter(|(_, set)| *set);
    set.map(|(field, _)| field.to_owned()).collect()
}

fn is(flag: Option<Flag>) -> bool {
    flag.is_some_and(|flag| flag.0)
}

/// Whether a duration is neither zero nor the usual one.
fn differs(period: Option<Period>, usual: u64) -> bool {
    let period = period.and_then(Period::set);
    period.is_some_and(|period| period != Duration::from_secs(usual))
}

fn without_use(wire: &Wire) -> Vec<String> {
    let mut found = Vec::new();
    let mut add = |field: &str, set: bool| {
        if set {
            found.push(field.to_owned());
        }
    };
    // Watches are resumed and not repeated.
    add("configSyncPeriod", differs(wire.config_sync_period, 900));
    add("enableProfiling", is(wire.enable_profiling));
    let gates = wire.feature_gates.as_ref();
    add("featureGates", gates.is_some_and(|gates| !gates.is_empty()));
    let empty = match &wire.logging.vmodule {
        None | Some(Value::Null) => true,
        Some(Value::Object(fields)) => fields.is_empty(),
        Some(Value::Array(items)) => items.is_empty(),
        Some(_) => false,
    };
    add("logging.vmodule", !empty);
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
