//! What the settings amount to: defaults that depend on other settings, and checks of several at once.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;

use super::kube_proxy::Verbose;
use super::{
    BindAddress, DetectLocalMode, Error, InterfaceName, NodePortAddressesSetting, PodStartup,
    Settings,
};

/// kube-proxy's address for probes: all, since load balancers connect from outside.
const HEALTHZ: Defaults = Defaults {
    port: 10256,
    v4: Ipv4Addr::UNSPECIFIED,
    v6: Ipv6Addr::UNSPECIFIED,
};

/// kube-proxy's address for metrics: loopback.
const METRICS: Defaults = Defaults {
    port: 10249,
    v4: Ipv4Addr::LOCALHOST,
    v6: Ipv6Addr::LOCALHOST,
};

/// The defaults of an address to listen on. The family is that of `--bind-address`.
struct Defaults {
    port: u16,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
}

/// A detect-local mode with its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum DetectLocalSetting {
    ClusterCidr(Vec<IpNet>),
    NodeCidr,
    BridgeInterface(String),
    InterfaceNamePrefix(String),
}

impl Settings {
    /// Returns whether rules of policies log packets.
    pub(crate) fn logs_packets(&self) -> bool {
        self.log_denied || self.audit_annotations.is_on()
    }

    /// Returns the address for probes.
    pub(crate) fn healthz_address(&self) -> Option<SocketAddr> {
        self.address(self.healthz_bind_address, self.healthz_port, &HEALTHZ)
    }

    /// Returns the address for metrics.
    pub(crate) fn metrics_address(&self) -> Option<SocketAddr> {
        self.address(self.metrics_bind_address, self.metrics_port, &METRICS)
    }

    /// Returns the level of the log, from 0 to 3.
    pub(crate) fn verbosity(&self) -> u8 {
        Verbose::sum(&self.verbose)
    }

    /// Returns the node's addresses on which NodePorts answer.
    ///
    /// # Errors
    ///
    /// If there are both `primary` and ranges.
    pub(crate) fn nodeport_addresses(&self) -> Result<NodePortAddressesSetting, Error> {
        let mut all = self.nodeport_addresses.iter();
        let mut sum = all.next().cloned().unwrap_or_default();
        for more in all {
            match (&mut sum, more) {
                (NodePortAddressesSetting::Ranges(sum), NodePortAddressesSetting::Ranges(more)) => {
                    sum.extend(more);
                }
                (NodePortAddressesSetting::Primary, NodePortAddressesSetting::Primary) => {}
                _ => return Err(Error::PrimaryAndRanges),
            }
        }
        Ok(sum)
    }

    /// Returns the name of this node: the setting, else the variable `NODE_NAME`, else the host name.
    /// Names of nodes are in lower case.
    pub(crate) fn node_name(&self, env: Option<String>, hostname: &str) -> String {
        let given = [self.hostname_override.as_deref(), env.as_deref()];
        let mut names = given.into_iter().flatten().map(str::trim);
        names
            .find(|name| !name.is_empty())
            .unwrap_or(hostname.trim())
            .to_lowercase()
    }

    /// Checks flags whose values exclude each other.
    ///
    /// # Errors
    ///
    /// If nothing is left to do.
    pub(crate) fn check(&self) -> Result<(), Error> {
        match (self.services.is_on(), self.network_policy.is_on()) {
            (false, false) => Err(Error::NothingToDo),
            (false, true) if self.init_only => Err(Error::InitOnlyWithoutServices),
            _ => Ok(()),
        }
    }

    /// Returns how traffic of pods is recognised.
    ///
    /// # Errors
    ///
    /// If the mode needs the name of an interface and there is none.
    pub(crate) fn detect_local(&self) -> Result<DetectLocalSetting, Error> {
        let needed = |name: &Option<InterfaceName>, error| match name {
            Some(InterfaceName(name)) if !name.is_empty() => Ok(name.clone()),
            _ => Err(error),
        };
        Ok(match self.detect_local_mode {
            DetectLocalMode::ClusterCidr => {
                DetectLocalSetting::ClusterCidr(self.cluster_cidr.as_slice().to_vec())
            }
            DetectLocalMode::NodeCidr => DetectLocalSetting::NodeCidr,
            DetectLocalMode::BridgeInterface => DetectLocalSetting::BridgeInterface(needed(
                &self.pod_bridge_interface,
                Error::NoBridge,
            )?),
            DetectLocalMode::InterfaceNamePrefix => DetectLocalSetting::InterfaceNamePrefix(
                needed(&self.pod_interface_name_prefix, Error::NoPrefix)?,
            ),
        })
    }

    /// Returns whether the pod network is closed to pods that are not known.
    ///
    /// # Errors
    ///
    /// If no policies are enforced, or the rules are written only once.
    pub(crate) fn is_closed(&self) -> Result<bool, Error> {
        let is_closed = self.pod_startup == PodStartup::Closed;
        match is_closed {
            true if !self.network_policy.is_on() => Err(Error::ClosedWithoutPolicies),
            true if self.once => Err(Error::ClosedOnce),
            _ => Ok(is_closed),
        }
    }

    /// Returns the connections for each core: the setting, or kube-proxy's default.
    pub(crate) fn conntrack_max_per_core(&self) -> u32 {
        self.conntrack_max_per_core.unwrap_or(32_768)
    }

    /// Returns the timeout of established TCP connections: the setting, or kube-proxy's default.
    pub(crate) fn conntrack_tcp_timeout_established(&self) -> Duration {
        let default = Duration::from_secs(24 * 60 * 60);
        self.conntrack_tcp_timeout_established.unwrap_or(default)
    }

    /// Returns the timeout of TCP connections in CLOSE_WAIT: the setting, or kube-proxy's default.
    pub(crate) fn conntrack_tcp_timeout_close_wait(&self) -> Duration {
        let default = Duration::from_secs(60 * 60);
        self.conntrack_tcp_timeout_close_wait.unwrap_or(default)
    }

    /// Returns the OOM score adjustment: the setting, or kube-proxy's default.
    pub(crate) fn oom_score_adj(&self) -> i16 {
        self.oom_score_adj.unwrap_or(-999)
    }

    /// Returns half the time that changes may wait before the agent is unhealthy.
    pub(crate) fn sync_period(&self) -> Duration {
        self.sync_period.unwrap_or(Duration::from_secs(30))
    }

    fn address(
        &self,
        given: Option<BindAddress>,
        port: Option<u16>,
        defaults: &Defaults,
    ) -> Option<SocketAddr> {
        if port == Some(0) {
            return None;
        }
        let port = port.unwrap_or(defaults.port);
        match given {
            Some(address) => address.resolve(port),
            // These runs are often on a node whose proxy has the ports.
            None if !self.manifests.is_empty() || self.dry_run || self.once => None,
            None => {
                let own = self.bind_address.map(|own| own.to_canonical());
                let address = match own {
                    Some(IpAddr::V6(_)) => IpAddr::V6(defaults.v6),
                    Some(IpAddr::V4(_)) | None => IpAddr::V4(defaults.v4),
                };
                Some(SocketAddr::new(address, port))
            }
        }
    }
}
