//! The fields of the file, each read as the value that its flag has.
//!
//! Single values are read as text and parsed as on the command line, so that both refuse the
//! same with the same words. Fields of other modes are read too: what is wrong with them is wrong with
//! the file, and [`super::notes`] tells what of them somebody wishes for.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{Deserializer, Error as _, SeqAccess, Visitor};
use serde::{Deserialize, de};
use serde_json::Value;

use crate::settings::{
    self, BindAddress, ClusterCidrs, DetectLocalMode, InterfaceName, LogFormat, NodePortAddresses,
    ProxyMode,
};

/// What a KubeProxyConfiguration holds.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Wire {
    api_version: Option<Value>,
    kind: Option<Value>,
    #[serde(deserialize_with = "single")]
    pub bind_address: Option<IpAddr>,
    #[serde(deserialize_with = "single")]
    pub bind_address_hard_fail: Option<Flag>,
    #[serde(deserialize_with = "group")]
    pub client_connection: ClientConnection,
    #[serde(rename = "clusterCIDR", deserialize_with = "single")]
    pub cluster_cidr: Option<ClusterCidrs>,
    #[serde(deserialize_with = "single")]
    pub config_sync_period: Option<Period>,
    #[serde(deserialize_with = "group")]
    pub conntrack: Conntrack,
    #[serde(deserialize_with = "group")]
    pub detect_local: DetectLocal,
    #[serde(deserialize_with = "single")]
    pub detect_local_mode: Option<DetectLocalMode>,
    #[serde(deserialize_with = "single")]
    pub enable_profiling: Option<Flag>,
    pub feature_gates: Option<BTreeMap<String, Gate>>,
    #[serde(deserialize_with = "single")]
    pub healthz_bind_address: Option<BindAddress>,
    #[serde(deserialize_with = "single")]
    pub hostname_override: Option<NodeName>,
    #[serde(deserialize_with = "group")]
    pub iptables: Iptables,
    #[serde(deserialize_with = "group")]
    pub ipvs: Ipvs,
    #[serde(deserialize_with = "group")]
    pub logging: Logging,
    #[serde(deserialize_with = "single")]
    pub metrics_bind_address: Option<BindAddress>,
    #[serde(deserialize_with = "single")]
    pub mode: Option<ProxyMode>,
    #[serde(deserialize_with = "group")]
    pub nftables: Nftables,
    pub node_port_addresses: Option<NodePorts>,
    #[serde(deserialize_with = "single")]
    pub oom_score_adj: Option<OomScoreAdj>,
    #[serde(deserialize_with = "single")]
    pub port_range: Option<String>,
    #[serde(deserialize_with = "single")]
    pub show_hidden_metrics_for_version: Option<String>,
    pub winkernel: Option<Value>,
    pub windows_run_as_service: Option<Value>,
}

/// How the API server is talked to. There is nothing to say but where: there are only as many
/// requests as watches.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct ClientConnection {
    #[serde(deserialize_with = "single")]
    pub kubeconfig: Option<PathBuf>,
    #[serde(deserialize_with = "single")]
    accept_content_types: Option<String>,
    #[serde(deserialize_with = "single")]
    content_type: Option<String>,
    #[serde(deserialize_with = "single")]
    burst: Option<Number>,
    #[serde(deserialize_with = "single")]
    qps: Option<Rate>,
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Conntrack {
    #[serde(deserialize_with = "single")]
    pub max_per_core: Option<Number>,
    #[serde(deserialize_with = "single")]
    pub min: Option<Number>,
    #[serde(deserialize_with = "single")]
    pub tcp_be_liberal: Option<Flag>,
    #[serde(deserialize_with = "single")]
    pub tcp_close_wait_timeout: Option<Period>,
    #[serde(deserialize_with = "single")]
    pub tcp_established_timeout: Option<Period>,
    #[serde(deserialize_with = "single")]
    pub udp_stream_timeout: Option<Period>,
    #[serde(deserialize_with = "single")]
    pub udp_timeout: Option<Period>,
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct DetectLocal {
    #[serde(deserialize_with = "single")]
    pub bridge_interface: Option<InterfaceName>,
    #[serde(deserialize_with = "single")]
    pub interface_name_prefix: Option<InterfaceName>,
}

/// The iptables mode, read for the sake of faults in it and of what somebody wishes for.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Iptables {
    #[serde(deserialize_with = "single")]
    localhost_node_ports: Option<Flag>,
    #[serde(deserialize_with = "single")]
    pub masquerade_all: Option<Flag>,
    #[serde(deserialize_with = "single")]
    pub masquerade_bit: Option<MasqueradeBit>,
    #[serde(deserialize_with = "single")]
    pub min_sync_period: Option<Period>,
    #[serde(deserialize_with = "single")]
    pub sync_period: Option<Period>,
}

/// The same of the ipvs mode.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Ipvs {
    #[serde(rename = "excludeCIDRs")]
    pub exclude_cidrs: Option<Vec<String>>,
    #[serde(deserialize_with = "single")]
    pub min_sync_period: Option<Period>,
    #[serde(deserialize_with = "single")]
    pub scheduler: Option<String>,
    #[serde(rename = "strictARP", deserialize_with = "single")]
    pub strict_arp: Option<Flag>,
    #[serde(deserialize_with = "single")]
    pub sync_period: Option<Period>,
    #[serde(deserialize_with = "single")]
    pub tcp_fin_timeout: Option<Period>,
    #[serde(deserialize_with = "single")]
    pub tcp_timeout: Option<Period>,
    #[serde(deserialize_with = "single")]
    pub udp_timeout: Option<Period>,
}

/// Whether a feature is on.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(transparent)]
pub(super) struct Gate(#[serde(deserialize_with = "single")] Option<Flag>);

#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Logging {
    /// A number of nanoseconds or a duration; nothing is held back here.
    flush_frequency: Option<Value>,
    #[serde(deserialize_with = "single")]
    pub format: Option<LogFormat>,
    options: Option<Value>,
    #[serde(deserialize_with = "single")]
    pub verbosity: Option<Number>,
    pub vmodule: Option<Value>,
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Nftables {
    #[serde(deserialize_with = "single")]
    pub masquerade_all: Option<Flag>,
    #[serde(deserialize_with = "single")]
    pub masquerade_bit: Option<MasqueradeBit>,
    #[serde(deserialize_with = "single")]
    pub min_sync_period: Option<Period>,
    #[serde(deserialize_with = "single")]
    pub sync_period: Option<Period>,
}

/// Reads a single value; null and an empty text mean that there is none.
fn single<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: fmt::Display>,
{
    struct Scalar<T>(PhantomData<T>);

    impl<'de, T: FromStr<Err: fmt::Display>> Visitor<'de> for Scalar<T> {
        type Value = Option<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a single value")
        }

        fn visit_none<E>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_some<D: Deserializer<'de>>(self, inner: D) -> Result<Self::Value, D::Error> {
            inner.deserialize_str(self)
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
            match text.trim() {
                "" => Ok(None),
                text => text.parse().map(Some).map_err(E::custom),
            }
        }
    }

    deserializer.deserialize_option(Scalar(PhantomData))
}

/// Reads a group of fields, which may be null.
fn group<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// Defines a value that is parsed by a function.
macro_rules! parsed {
    ($(#[$doc:meta])* $name:ident($type:ty), $parse:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq)]
        pub(super) struct $name(pub $type);

        impl FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                let parse: fn(&str) -> Result<$type, String> = $parse;
                parse(text).map(Self)
            }
        }
    };
    ($(#[$doc:meta])* copy $name:ident($type:ty), $parse:expr) => {
        parsed!($(#[$doc])* $name($type), $parse);
        impl Copy for $name {}
    };
}

parsed!(
    /// Yes or no, in the words of YAML 1.1, which Kubernetes reads.
    copy Flag(bool),
    |text| match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" => Ok(true),
        "false" | "no" | "off" => Ok(false),
        _ => Err(format!("`{text}` is neither true nor false")),
    }
);

parsed!(
    /// A number that is not negative, as kube-proxy wants all of them.
    copy Number(u32),
    |text| match text.parse::<i32>() {
        Ok(number) => number
            .try_into()
            .map_err(|_| format!("{number} is below zero; write 0 or more")),
        Err(_) => Err(format!("`{text}` is not a whole number up to {}", i32::MAX)),
    }
);

parsed!(
    /// Requests in a second.
    copy Rate(f64),
    |text| text.parse().map_err(|_| format!("`{text}` is not a number"))
);

parsed!(
    /// A duration, such as `15m0s`.
    copy Period(Duration),
    |text| settings::duration(text).map_err(|error| error.to_string())
);

parsed!(
    copy MasqueradeBit(u8),
    |text| settings::masquerade_bit(text).map_err(|error| error.to_string())
);

parsed!(
    copy OomScoreAdj(i16),
    |text| settings::oom_score_adj(text).map_err(|error| error.to_string())
);

parsed!(NodeName(String), |text| settings::node_name(text)
    .map_err(|error| error.to_string()));

impl Period {
    /// The duration, unless it is zero and asks for nothing.
    pub(super) fn set(self) -> Option<Duration> {
        Some(self.0).filter(|duration| !duration.is_zero())
    }
}

/// `nodePortAddresses`: a list of what `--nodeport-addresses` separates by commas.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct NodePorts(pub NodePortAddresses);

impl<'de> Deserialize<'de> for NodePorts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;

        impl<'de> Visitor<'de> for List {
            type Value = Vec<String>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<String>, A::Error> {
                let mut all = Vec::new();
                while let Some(Range(text)) = list.next_element()? {
                    all.push(text);
                }
                Ok(all)
            }
        }

        let all = deserializer.deserialize_seq(List)?;
        // Each was looked at by itself; what is left are contradictions.
        let addresses = all.join(",").parse().map_err(D::Error::custom)?;
        Ok(Self(addresses))
    }
}

/// One entry of the list, refused at its own place.
struct Range(String);

impl<'de> Deserialize<'de> for Range {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let fault = match text.parse::<NodePortAddresses>() {
            Ok(_) if !text.trim().is_empty() => return Ok(Self(text)),
            Ok(_) => "an entry is empty; write primary or ranges like 10.0.0.0/8".to_owned(),
            Err(error) => error.to_string(),
        };
        Err(D::Error::custom(fault))
    }
}
