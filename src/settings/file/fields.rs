//! The fields of a KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1): one line for each.

use std::error::Error;
use std::net::Ipv4Addr;
use std::str::FromStr;
use std::time::Duration;

use serde_json::{Value, json};

use super::{KIND, VERSION};
use crate::settings::kube_proxy::Verbose;
use crate::settings::values::{
    count, duration, go_duration, masquerade_bit, node_name, oom_score_adj, yaml_switch,
};
use crate::settings::{self, kube_proxy};
use crate::settings::{NodePortAddresses, ProxyMode, Settings};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// A field that stands for flags.
pub(in crate::settings) struct Field {
    /// The names of its group and itself, joined by dots.
    pub(super) path: &'static str,
    /// The names of the flags in [`Settings`].
    pub(in crate::settings) flags: &'static [&'static str],
    /// Whether a given flag counts for more than the file, as with kube-proxy.
    pub(in crate::settings) flag_wins: bool,
    /// Whether it is a list. Its entries are read one by one, and then joined by commas.
    pub(super) is_list: bool,
    /// Reads a text that is not empty.
    pub(super) read: fn(&mut Settings, &str) -> Result<()>,
    /// Returns the value in force.
    pub(super) write: fn(&Settings) -> Value,
}

impl Field {
    const fn new(
        path: &'static str,
        flags: &'static [&'static str],
        read: fn(&mut Settings, &str) -> Result<()>,
        write: fn(&Settings) -> Value,
    ) -> Self {
        Self {
            path,
            flags,
            flag_wins: false,
            is_list: false,
            read,
            write,
        }
    }

    const fn unless_given(mut self) -> Self {
        self.flag_wins = true;
        self
    }

    const fn list(mut self) -> Self {
        self.is_list = true;
        self
    }
}

/// A field without effect. What is wrong with its value is wrong with the file all the same.
pub(super) struct Unused {
    pub(super) path: &'static str,
    pub(super) kind: Kind,
    /// Whether a value other than zero and `usual` is worth a warning.
    pub(super) is_noted: bool,
    /// kube-proxy's default, which kubeadm and kube-proxy write.
    pub(super) usual: &'static str,
    /// The value to write, if the field is written.
    pub(super) written: Option<&'static str>,
}

/// The type of a field without effect.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    Single(fn(&str) -> Result<Value>),
    /// A list of anything.
    List,
    /// Switches with names.
    Switches,
}

const TEXT: Kind = Kind::Single(|text| Ok(text.into()));
const SWITCH: Kind = Kind::Single(|text| Ok(yaml_switch(text)?.into()));
const COUNT: Kind = Kind::Single(|text| Ok(count(text)?.into()));
const BIT: Kind = Kind::Single(|text| Ok(masquerade_bit(text)?.into()));
const PERIOD: Kind = Kind::Single(|text| Ok(go_duration(duration(text)?).into()));
const RATE: Kind = Kind::Single(|text| match text.parse::<f64>() {
    Ok(rate) if rate == 0.0 => Ok(0.into()),
    Ok(rate) => Ok(rate.into()),
    Err(_) => Err(format!("`{text}` is not a number").into()),
});

/// One of the switches of [`Kind::Switches`].
pub(super) const NAMED_SWITCH: Unused = silent("", SWITCH, None);

impl Unused {
    /// Checks a value, and returns whether it is zero or the usual one.
    pub(super) fn is_usual(&self, text: &str) -> Result<bool> {
        let Kind::Single(read) = self.kind else {
            return Ok(true);
        };
        let value = read(text)?;
        let zeros = [json!(false), json!(0), json!("0s")];
        Ok(zeros.contains(&value) || !self.usual.is_empty() && read(self.usual)? == value)
    }

    fn write(&self) -> Option<Value> {
        match self.kind {
            Kind::Single(read) => self.written.map(|text| read(text).unwrap_or_default()),
            Kind::List | Kind::Switches => self.written.map(|_| Value::Null),
        }
    }
}

/// A field that is accepted without a word.
const fn silent(path: &'static str, kind: Kind, written: Option<&'static str>) -> Unused {
    Unused {
        path,
        kind,
        is_noted: false,
        usual: "",
        written,
    }
}

/// A field with a warning about values other than zero and the usual one.
const fn noted(
    path: &'static str,
    kind: Kind,
    usual: &'static str,
    written: Option<&'static str>,
) -> Unused {
    Unused {
        path,
        kind,
        is_noted: true,
        usual,
        written,
    }
}

/// Sets a value that could be read.
fn put<T, E: Error + 'static>(place: &mut T, read: std::result::Result<T, E>) -> Result<()> {
    *place = read?;
    Ok(())
}

fn parsed<T: FromStr>(text: &str) -> std::result::Result<Option<T>, T::Err> {
    text.parse().map(Some)
}

/// Reads a duration of which zero is none.
fn period_or_none(text: &str) -> std::result::Result<Option<Duration>, settings::Error> {
    let period = duration(text)?;
    Ok(Some(period).filter(|period| !period.is_zero()))
}

/// Reads a verbosity of kube-proxy. One that changes nothing is none.
fn verbosity(text: &str) -> std::result::Result<Vec<Verbose>, settings::Error> {
    let level = Verbose::of_kube_proxy(count(text)?);
    Ok(Some(level)
        .filter(|it| Verbose::sum(&[*it]) > 0)
        .into_iter()
        .collect())
}

fn written(value: &impl ToString) -> Value {
    value.to_string().into()
}

fn written_or_empty(value: Option<impl ToString>) -> Value {
    value.map_or("".into(), |value| written(&value))
}

fn period(duration: Duration) -> Value {
    go_duration(duration).into()
}

fn nodeport_ranges(settings: &Settings) -> Value {
    match settings.nodeport_addresses().unwrap_or_default() {
        primary @ NodePortAddresses::Primary => Value::Array(vec![written(&primary)]),
        NodePortAddresses::Ranges(ranges) => ranges.iter().map(written).collect(),
    }
}

/// The fields that stand for flags, and `nftables.syncPeriod`, which has none.
pub(in crate::settings) const FIELDS: &[Field] = &[
    Field::new(
        "bindAddress",
        &["bind_address"],
        |it, text| put(&mut it.bind_address, parsed(text)),
        |it| written(&it.bind_address.unwrap_or(Ipv4Addr::UNSPECIFIED.into())),
    ),
    Field::new(
        "bindAddressHardFail",
        &["bind_address_hard_fail"],
        |it, text| put(&mut it.bind_address_hard_fail, yaml_switch(text)),
        |it| it.bind_address_hard_fail.into(),
    ),
    Field::new(
        "clientConnection.kubeconfig",
        &["kubeconfig"],
        |it, text| put(&mut it.kubeconfig, parsed(text)),
        |it| written_or_empty(it.kubeconfig.as_ref().map(|path| path.display())),
    ),
    Field::new(
        "clusterCIDR",
        &["cluster_cidr"],
        |it, text| put(&mut it.cluster_cidr, text.parse()),
        |it| written(&it.cluster_cidr),
    ),
    Field::new(
        "conntrack.maxPerCore",
        &["conntrack_max_per_core"],
        |it, text| {
            put(
                &mut it.conntrack.conntrack_max_per_core,
                count(text).map(Some),
            )
        },
        |it| it.conntrack.max_per_core().into(),
    ),
    Field::new(
        "conntrack.min",
        &["conntrack_min"],
        |it, text| put(&mut it.conntrack.conntrack_min, count(text)),
        |it| it.conntrack.conntrack_min.into(),
    ),
    Field::new(
        "conntrack.tcpBeLiberal",
        &["conntrack_tcp_be_liberal"],
        |it, text| {
            put(
                &mut it.conntrack.conntrack_tcp_be_liberal,
                yaml_switch(text),
            )
        },
        |it| it.conntrack.conntrack_tcp_be_liberal.into(),
    ),
    Field::new(
        "conntrack.tcpCloseWaitTimeout",
        &["conntrack_tcp_timeout_close_wait"],
        |it, text| {
            put(
                &mut it.conntrack.conntrack_tcp_timeout_close_wait,
                duration(text).map(Some),
            )
        },
        |it| period(it.conntrack.tcp_close_wait()),
    ),
    Field::new(
        "conntrack.tcpEstablishedTimeout",
        &["conntrack_tcp_timeout_established"],
        |it, text| {
            put(
                &mut it.conntrack.conntrack_tcp_timeout_established,
                duration(text).map(Some),
            )
        },
        |it| period(it.conntrack.tcp_established()),
    ),
    Field::new(
        "conntrack.udpStreamTimeout",
        &["conntrack_udp_timeout_stream"],
        |it, text| {
            put(
                &mut it.conntrack.conntrack_udp_timeout_stream,
                period_or_none(text),
            )
        },
        |it| {
            period(
                it.conntrack
                    .conntrack_udp_timeout_stream
                    .unwrap_or_default(),
            )
        },
    ),
    Field::new(
        "conntrack.udpTimeout",
        &["conntrack_udp_timeout"],
        |it, text| {
            put(
                &mut it.conntrack.conntrack_udp_timeout,
                period_or_none(text),
            )
        },
        |it| period(it.conntrack.conntrack_udp_timeout.unwrap_or_default()),
    ),
    Field::new(
        "detectLocal.bridgeInterface",
        &["pod_bridge_interface"],
        |it, text| put(&mut it.pod_bridge_interface, parsed(text)),
        |it| written_or_empty(it.pod_bridge_interface.as_ref()),
    ),
    Field::new(
        "detectLocal.interfaceNamePrefix",
        &["pod_interface_name_prefix"],
        |it, text| put(&mut it.pod_interface_name_prefix, parsed(text)),
        |it| written_or_empty(it.pod_interface_name_prefix.as_ref()),
    ),
    Field::new(
        "detectLocalMode",
        &["detect_local_mode"],
        |it, text| put(&mut it.detect_local_mode, text.parse()),
        |it| written(&it.detect_local_mode),
    ),
    Field::new(
        "healthzBindAddress",
        &["healthz_bind_address", "healthz_port"],
        |it, text| put(&mut it.healthz_bind_address, parsed(text)),
        |it| written_or_empty(it.healthz_address()),
    ),
    Field::new(
        "hostnameOverride",
        &["hostname_override"],
        |it, text| put(&mut it.hostname_override, node_name(text).map(Some)),
        |it| written_or_empty(it.hostname_override.as_ref()),
    )
    .unless_given(),
    Field::new(
        "logging.format",
        &["log_format"],
        |it, text| put(&mut it.log_format, text.parse()),
        |it| written(&it.log_format),
    )
    .unless_given(),
    Field::new(
        "logging.verbosity",
        &["verbose"],
        |it, text| put(&mut it.verbose, verbosity(text)),
        |it| kube_proxy::to_kube_proxy(it.verbosity()).into(),
    )
    .unless_given(),
    Field::new(
        "metricsBindAddress",
        &["metrics_bind_address", "metrics_port"],
        |it, text| put(&mut it.metrics_bind_address, parsed(text)),
        |it| written_or_empty(it.metrics_address()),
    ),
    Field::new(
        "mode",
        &["proxy_mode"],
        |it, text| put(&mut it.proxy_mode, text.parse()),
        |_| written(&ProxyMode::Nftables),
    ),
    Field::new(
        "nftables.masqueradeAll",
        &["masquerade_all"],
        |it, text| put(&mut it.masquerade_all, yaml_switch(text)),
        |it| it.masquerade_all.into(),
    ),
    Field::new(
        "nftables.masqueradeBit",
        &["masquerade_bit"],
        |it, text| put(&mut it.masquerade_bit, masquerade_bit(text)),
        |it| it.masquerade_bit.into(),
    ),
    Field::new(
        "nftables.syncPeriod",
        &[],
        |it, text| put(&mut it.sync_period, period_or_none(text)),
        |it| period(it.sync_period()),
    ),
    Field::new(
        "nodePortAddresses",
        &["nodeport_addresses"],
        |it, text| {
            put(
                &mut it.nodeport_addresses,
                text.parse().map(|all| vec![all]),
            )
        },
        |it| nodeport_ranges(it),
    )
    .list(),
    Field::new(
        "oomScoreAdj",
        &["oom_score_adj"],
        |it, text| put(&mut it.oom_score_adj, oom_score_adj(text).map(Some)),
        |it| it.oom_score_adj().into(),
    ),
];

/// The fields without effect.
pub(super) const UNUSED: &[Unused] = &[
    silent("apiVersion", TEXT, Some(VERSION)),
    silent("clientConnection.acceptContentTypes", TEXT, Some("")),
    silent("clientConnection.burst", COUNT, Some("0")),
    silent("clientConnection.contentType", TEXT, Some("")),
    silent("clientConnection.qps", RATE, Some("0")),
    // Watches are resumed and not repeated.
    noted("configSyncPeriod", PERIOD, "15m", Some("15m")),
    noted("enableProfiling", SWITCH, "", Some("false")),
    noted("featureGates", Kind::Switches, "", None),
    silent("iptables.localhostNodePorts", SWITCH, Some("true")),
    noted("iptables.masqueradeAll", SWITCH, "", Some("false")),
    noted("iptables.masqueradeBit", BIT, "14", Some("14")),
    noted("iptables.minSyncPeriod", PERIOD, "1s", Some("1s")),
    noted("iptables.syncPeriod", PERIOD, "30s", Some("30s")),
    noted("ipvs.excludeCIDRs", Kind::List, "", Some("")),
    noted("ipvs.minSyncPeriod", PERIOD, "1s", Some("0s")),
    noted("ipvs.scheduler", TEXT, "rr", Some("")),
    noted("ipvs.strictARP", SWITCH, "", Some("false")),
    noted("ipvs.syncPeriod", PERIOD, "30s", Some("0s")),
    noted("ipvs.tcpFinTimeout", PERIOD, "", Some("0s")),
    noted("ipvs.tcpTimeout", PERIOD, "", Some("0s")),
    noted("ipvs.udpTimeout", PERIOD, "", Some("0s")),
    silent("kind", TEXT, Some(KIND)),
    silent("logging.flushFrequency", TEXT, Some("0s")),
    silent("logging.options.json.infoBufferSize", TEXT, Some("0")),
    silent("logging.options.json.splitStream", SWITCH, None),
    silent("logging.options.text.infoBufferSize", TEXT, Some("0")),
    silent("logging.options.text.splitStream", SWITCH, None),
    noted("logging.vmodule", Kind::List, "", None),
    // Changes are written as they come.
    noted("nftables.minSyncPeriod", PERIOD, "1s", Some("0s")),
    noted("portRange", TEXT, "", Some("")),
    noted("showHiddenMetricsForVersion", TEXT, "", Some("")),
    noted("winkernel.enableDSR", SWITCH, "", Some("false")),
    noted("winkernel.forwardHealthCheckVip", SWITCH, "", Some("false")),
    noted("winkernel.networkName", TEXT, "", Some("")),
    noted("winkernel.rootHnsEndpointName", TEXT, "", Some("")),
    noted("winkernel.sourceVip", TEXT, "", Some("")),
    noted("windowsRunAsService", SWITCH, "", None),
];

/// The groups of the other modes, and of other systems.
const OF_OTHER_MODES: [&str; 4] = ["iptables", "ipvs", "winkernel", "windowsRunAsService"];

/// Returns whether the field at a path is of another mode than nftables on Linux.
pub(super) fn is_of_other_mode(path: &str) -> bool {
    OF_OTHER_MODES.contains(&path.split('.').next().unwrap_or_default())
}

/// Returns the settings in force as a complete KubeProxyConfiguration. Fields that nftlet has no use
/// for hold zero values, those of other modes kube-proxy's defaults.
pub(crate) fn effective(settings: &Settings) -> Value {
    let fields = FIELDS.iter().map(|it| (it.path, (it.write)(settings)));
    let unused = UNUSED.iter().filter_map(|it| Some((it.path, it.write()?)));
    let mut all = Value::Null;
    for (path, value) in fields.chain(unused) {
        let place = path
            .split('.')
            .fold(&mut all, |group, name| &mut group[name]);
        *place = value;
    }
    all
}
