//! The fields of a KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1): one line for each.

use std::error::Error;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde_json::{Value, json};

use super::{KIND, VERSION};
use crate::settings::kube_proxy::{Verbose, to_kube_proxy};
use crate::settings::values::{
    count, duration, go_duration, masquerade_bit, node_name, oom_score_adj, yaml_switch,
};
use crate::settings::{
    self, BindAddress, ClusterCidrs, DetectLocalMode, InterfaceName, LogFormat,
    NodePortAddressesSetting, ProxyMode, Settings,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// A field of a setting.
pub(in crate::settings) struct Field {
    /// The names of its groups and its own, joined by dots.
    pub(super) path: &'static str,
    /// The flags of the setting, by their names in [`Settings`].
    pub(in crate::settings) flags: &'static [&'static str],
    /// Whether a given flag takes precedence over the file, as in kube-proxy.
    pub(in crate::settings) flag_wins: bool,
    /// Whether it is a list: each entry is read, and then all of them joined by commas.
    pub(super) is_list: bool,
    /// Reads a text that is not empty.
    pub(super) read: fn(&mut Settings, &str) -> Result<()>,
    write: fn(&Settings) -> Value,
}

/// Declares a field by its path, the setting, and the function that parses a text. The flag has the
/// name of the setting.
macro_rules! field {
    ($path:literal, $setting:ident, $parse:expr) => {
        Field {
            path: $path,
            flags: &[stringify!($setting)],
            flag_wins: false,
            is_list: false,
            read: |settings, text| {
                settings.$setting = $parse(text)?.into();
                Ok(())
            },
            write: |settings| settings.$setting.written(),
        }
    };
}

impl Field {
    const fn flags(mut self, flags: &'static [&'static str]) -> Self {
        self.flags = flags;
        self
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

/// A field without effect. An invalid value is still an error.
pub(super) struct Unused {
    pub(super) path: &'static str,
    pub(super) kind: UnusedType,
    /// Whether a value other than zero and `usual` causes a warning.
    pub(super) is_noted: bool,
    /// kube-proxy's default, which kubeadm and kube-proxy write.
    pub(super) usual: &'static str,
    /// The value to write, if the field is written.
    pub(super) written: Option<&'static str>,
}

/// The type of a field without effect.
#[derive(Clone, Copy)]
pub(super) enum UnusedType {
    Single(fn(&str) -> Result<Value>),
    /// A list of anything.
    List,
    /// Switches with names.
    Switches,
}

const TEXT: UnusedType = UnusedType::Single(|text| Ok(text.into()));
const SWITCH: UnusedType = UnusedType::Single(|text| Ok(yaml_switch(text)?.into()));
const COUNT: UnusedType = UnusedType::Single(|text| Ok(count(text)?.into()));
const BIT: UnusedType = UnusedType::Single(|text| Ok(masquerade_bit(text)?.into()));
const PERIOD: UnusedType = UnusedType::Single(|text| Ok(go_duration(duration(text)?).into()));
const RATE: UnusedType = UnusedType::Single(|text| match text.parse::<f64>() {
    Ok(0.0) => Ok(0.into()),
    Ok(rate) => Ok(rate.into()),
    Err(_) => Err(format!("`{text}` is not a number").into()),
});

/// One of the switches of [`UnusedType::Switches`].
pub(super) const NAMED_SWITCH: Unused = silent("", SWITCH, None);

impl Unused {
    /// Checks a value, and returns whether it is zero or the usual one.
    pub(super) fn is_usual(&self, text: &str) -> Result<bool> {
        let UnusedType::Single(read) = self.kind else {
            return Ok(true);
        };
        let value = read(text)?;
        let zeros = [json!(false), json!(0), json!("0s")];
        Ok(zeros.contains(&value) || !self.usual.is_empty() && read(self.usual)? == value)
    }

    fn write(&self) -> Option<Value> {
        match self.kind {
            UnusedType::Single(read) => self.written.map(|text| read(text).unwrap_or_default()),
            UnusedType::List | UnusedType::Switches => self.written.map(|_| Value::Null),
        }
    }
}

/// Declares a field that is accepted without a warning.
const fn silent(path: &'static str, kind: UnusedType, written: Option<&'static str>) -> Unused {
    let (is_noted, usual) = (false, "");
    Unused {
        path,
        kind,
        is_noted,
        usual,
        written,
    }
}

/// Declares a field with a warning about values other than zero and the usual one.
const fn noted(
    path: &'static str,
    kind: UnusedType,
    usual: &'static str,
    written: Option<&'static str>,
) -> Unused {
    Unused {
        is_noted: true,
        usual,
        ..silent(path, kind, written)
    }
}

type Parsed<T> = std::result::Result<T, settings::Error>;

fn parse<T: FromStr>(text: &str) -> std::result::Result<T, T::Err> {
    text.parse()
}

/// Parses a duration. Zero means none.
fn period(text: &str) -> Parsed<Option<Duration>> {
    let period = duration(text)?;
    Ok(Some(period).filter(|period| !period.is_zero()))
}

/// Parses a verbosity of kube-proxy. One without additional lines means none.
fn verbosity(text: &str) -> Parsed<Vec<Verbose>> {
    let level = Some(Verbose::of_kube_proxy(count(text)?));
    Ok(level
        .filter(|it| Verbose::sum(&[*it]) > 0)
        .into_iter()
        .collect())
}

fn nodeport_addresses(text: &str) -> Parsed<Vec<NodePortAddressesSetting>> {
    Ok(vec![text.parse()?])
}

/// The value of a setting in the file.
trait Written {
    fn written(&self) -> Value;
}

impl<T: Written> Written for Option<T> {
    fn written(&self) -> Value {
        self.as_ref().map_or("".into(), T::written)
    }
}

macro_rules! written {
    ($($type:ty: |$it:ident| $value:expr,)+) => {
        $(impl Written for $type {
            fn written(&self) -> Value {
                let $it = self;
                Value::from($value)
            }
        })+
    };
}

written! {
    bool: |it| *it,
    u8: |it| *it,
    i16: |it| *it,
    u32: |it| *it,
    String: |it| it.as_str(),
    Duration: |it| go_duration(*it),
    PathBuf: |it| it.display().to_string(),
    IpAddr: |it| it.to_string(),
    BindAddress: |it| it.to_string(),
    ClusterCidrs: |it| it.to_string(),
    DetectLocalMode: |it| it.to_string(),
    InterfaceName: |it| it.to_string(),
    LogFormat: |it| it.to_string(),
    ProxyMode: |it| it.to_string(),
    Vec<Verbose>: |it| to_kube_proxy(Verbose::sum(it)),
    Vec<NodePortAddressesSetting>: |it| it.iter().flat_map(NodePortAddressesSetting::entries).collect::<Vec<_>>(),
}

/// The fields of settings. `nftables.syncPeriod` has no flag.
#[rustfmt::skip]
pub(in crate::settings) const FIELDS: &[Field] = &[
    field!("bindAddress", bind_address, parse::<IpAddr>),
    field!("bindAddressHardFail", bind_address_hard_fail, yaml_switch),
    field!("clientConnection.kubeconfig", kubeconfig, parse::<PathBuf>),
    field!("clusterCIDR", cluster_cidr, parse::<ClusterCidrs>),
    field!("conntrack.maxPerCore", conntrack_max_per_core, count),
    field!("conntrack.min", conntrack_min, count),
    field!("conntrack.tcpBeLiberal", conntrack_tcp_be_liberal, yaml_switch),
    field!("conntrack.tcpCloseWaitTimeout", conntrack_tcp_timeout_close_wait, duration),
    field!("conntrack.tcpEstablishedTimeout", conntrack_tcp_timeout_established, duration),
    field!("conntrack.udpStreamTimeout", conntrack_udp_timeout_stream, period),
    field!("conntrack.udpTimeout", conntrack_udp_timeout, period),
    field!("detectLocal.bridgeInterface", pod_bridge_interface, parse::<InterfaceName>),
    field!("detectLocal.interfaceNamePrefix", pod_interface_name_prefix, parse::<InterfaceName>),
    field!("detectLocalMode", detect_local_mode, parse::<DetectLocalMode>),
    field!("healthzBindAddress", healthz_bind_address, parse::<BindAddress>)
        .flags(&["healthz_bind_address", "healthz_port"]),
    field!("hostnameOverride", hostname_override, node_name).unless_given(),
    field!("logging.format", log_format, parse::<LogFormat>).unless_given(),
    field!("logging.verbosity", verbose, verbosity).unless_given(),
    field!("metricsBindAddress", metrics_bind_address, parse::<BindAddress>)
        .flags(&["metrics_bind_address", "metrics_port"]),
    field!("mode", proxy_mode, parse::<ProxyMode>),
    field!("nftables.masqueradeAll", masquerade_all, yaml_switch),
    field!("nftables.masqueradeBit", masquerade_bit, masquerade_bit),
    field!("nftables.syncPeriod", sync_period, period).flags(&[]),
    field!("nodePortAddresses", nodeport_addresses, nodeport_addresses).list(),
    field!("oomScoreAdj", oom_score_adj, oom_score_adj),
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
    noted("featureGates", UnusedType::Switches, "", None),
    silent("iptables.localhostNodePorts", SWITCH, Some("true")),
    noted("iptables.masqueradeAll", SWITCH, "", Some("false")),
    noted("iptables.masqueradeBit", BIT, "14", Some("14")),
    noted("iptables.minSyncPeriod", PERIOD, "1s", Some("1s")),
    noted("iptables.syncPeriod", PERIOD, "30s", Some("30s")),
    noted("ipvs.excludeCIDRs", UnusedType::List, "", Some("")),
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
    noted("logging.vmodule", UnusedType::List, "", None),
    // Changes are written at once.
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

/// Returns the settings in force as a complete KubeProxyConfiguration. Fields that nftlet does not
/// use have zero values, those of other modes kube-proxy's defaults.
pub(crate) fn effective(settings: &Settings) -> Value {
    let settings = with_defaults(settings);
    let fields = FIELDS.iter().map(|it| (it.path, (it.write)(&settings)));
    let unused = UNUSED.iter().filter_map(|it| Some((it.path, it.write()?)));
    let mut all = Value::Null;
    for (path, value) in fields.chain(unused) {
        let value_at = path
            .split('.')
            .fold(&mut all, |group, name| &mut group[name]);
        *value_at = value;
    }
    all
}

/// Returns the settings, with defaults for unset ones.
fn with_defaults(settings: &Settings) -> Settings {
    let unspecified = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    Settings {
        bind_address: Some(settings.bind_address.unwrap_or(unspecified)),
        conntrack_max_per_core: Some(settings.conntrack_max_per_core()),
        conntrack_tcp_timeout_established: Some(settings.conntrack_tcp_timeout_established()),
        conntrack_tcp_timeout_close_wait: Some(settings.conntrack_tcp_timeout_close_wait()),
        conntrack_udp_timeout: Some(settings.conntrack_udp_timeout.unwrap_or_default()),
        conntrack_udp_timeout_stream: Some(
            settings.conntrack_udp_timeout_stream.unwrap_or_default(),
        ),
        healthz_bind_address: settings.healthz_address().map(BindAddress::from),
        metrics_bind_address: settings.metrics_address().map(BindAddress::from),
        oom_score_adj: Some(settings.oom_score_adj()),
        proxy_mode: ProxyMode::default(),
        sync_period: Some(settings.sync_period()),
        ..settings.clone()
    }
}
