//! Bridges on which traffic between pods of this node bypasses NetworkPolicy.
//!
//! With many network plugins the pods of a node are ports of one Linux bridge. Packets between them
//! are switched, not routed. They traverse the forward hook, where policies are enforced, only if
//! br_netfilter is loaded and its sysctl for the family is 1, for all bridges or for this one.
//!
//! [`BridgeWatch::check`] finds bridges with isolated pods where this is not so. It sets no sysctl,
//! since that would affect all bridges of the host.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;

use super::addresses::Attached;

/// A bridge on which traffic of isolated pods bypasses NetworkPolicy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct UnfilteredBridge {
    pub(crate) bridge: String,
    ipv6: bool,
    /// The value of the sysctl for all bridges; `None` without br_netfilter.
    setting: Option<String>,
}

impl UnfilteredBridge {
    fn key(&self) -> &'static str {
        if self.ipv6 {
            "net.bridge.bridge-nf-call-ip6tables"
        } else {
            "net.bridge.bridge-nf-call-iptables"
        }
    }

    /// Returns the file in sysfs with the setting of a single bridge.
    fn of_bridge(&self) -> &'static str {
        if self.ipv6 {
            "nf_call_ip6tables"
        } else {
            "nf_call_iptables"
        }
    }

    pub(crate) fn family(&self) -> &'static str {
        if self.ipv6 { "IPv6" } else { "IPv4" }
    }
}

impl fmt::Display for UnfilteredBridge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (family, key) = (self.family(), self.key());
        write!(
            f,
            "pod-to-pod {family} traffic bypasses NetworkPolicy: {key} is "
        )?;
        match &self.setting {
            Some(value) => write!(f, "{value}; sysctl -w {key}=1"),
            None => write!(f, "missing; modprobe br_netfilter, then sysctl -w {key}=1"),
        }
    }
}

/// A difference from the previous check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum BridgeChange {
    /// Traffic bypasses policies.
    Begins(UnfilteredBridge),
    /// Traffic no longer bypasses policies.
    Ends(UnfilteredBridge),
}

/// Finds unfiltered bridges, and remembers the result of the previous check.
#[derive(Debug)]
pub(crate) struct BridgeWatch {
    root: PathBuf,
    /// By name and family (true for IPv6).
    found: BTreeMap<(String, bool), UnfilteredBridge>,
}

impl BridgeWatch {
    /// Creates a watch that reads files below a root directory (`/`).
    pub(crate) fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            found: BTreeMap::new(),
        }
    }

    /// Checks the bridges, given the addresses of the host's interfaces and of the isolated pods, and
    /// returns what changed.
    pub(crate) fn check(&mut self, attached: &[Attached], pods: &[IpAddr]) -> Vec<BridgeChange> {
        let found = all_unfiltered(&self.root, attached, pods);
        let mut before = std::mem::replace(&mut self.found, found.clone());
        let mut changes = Vec::new();
        for (key, unfiltered) in found {
            if before.remove(&key).as_ref() != Some(&unfiltered) {
                changes.push(BridgeChange::Begins(unfiltered));
            }
        }
        changes.extend(before.into_values().map(BridgeChange::Ends));
        changes
    }

    /// Returns whether the last check found an unfiltered bridge of a family.
    pub(crate) fn is_unfiltered(&self, ipv6: bool) -> bool {
        self.found.keys().any(|(_, of_ipv6)| *of_ipv6 == ipv6)
    }
}

/// Returns the bridges with isolated pods whose packets are not filtered.
fn all_unfiltered(
    root: &Path,
    attached: &[Attached],
    pods: &[IpAddr],
) -> BTreeMap<(String, bool), UnfilteredBridge> {
    let mut found = BTreeMap::new();
    for Attached { interface, network } in attached {
        let key = (interface.clone(), network.addr().is_ipv6());
        let has_pods = pods.iter().any(|pod| network.contains(pod));
        if has_pods
            && !found.contains_key(&key)
            && let Some(unfiltered) = unfiltered(root, interface, key.1)
        {
            found.insert(key, unfiltered);
        }
    }
    found
}

/// Returns the networks of bridges below a root directory (`/`) whose packets are not filtered.
pub(crate) fn unfiltered_networks(root: &Path, attached: &[Attached]) -> Vec<IpNet> {
    let networks = attached.iter().filter(|Attached { interface, network }| {
        unfiltered(root, interface, network.addr().is_ipv6()).is_some()
    });
    networks.map(|attached| attached.network.trunc()).collect()
}

/// Returns an interface if it is a bridge whose packets are not filtered.
fn unfiltered(root: &Path, interface: &str, ipv6: bool) -> Option<UnfilteredBridge> {
    let folder = root.join("sys/class/net").join(interface).join("bridge");
    if !folder.is_dir() {
        return None;
    }
    let found = UnfilteredBridge {
        bridge: interface.to_owned(),
        ipv6,
        setting: None,
    };
    let file = root
        .join("proc/sys")
        .join(found.key().replacen('.', "/", 2));
    let setting = fs::read_to_string(file)
        .ok()
        .map(|text| text.trim().to_owned());
    // Without br_netfilter, which brings the setting of all bridges, that of one has no effect.
    let of_bridge = || {
        let file = folder.join(found.of_bridge());
        setting.is_some() && fs::read_to_string(file).is_ok_and(|text| text.trim() == "1")
    };
    let filtered = setting.as_deref() == Some("1") || of_bridge();
    (!filtered).then_some(UnfilteredBridge { setting, ..found })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// A host with the bridge cni0 and the interface eth0.
    struct Host {
        root: tempfile::TempDir,
        attached: Vec<Attached>,
    }

    impl Host {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            for folder in ["cni0/bridge", "eth0"] {
                fs::create_dir_all(root.path().join("sys/class/net").join(folder)).unwrap();
            }
            fs::create_dir_all(root.path().join("proc/sys/net/bridge")).unwrap();
            let on = |interface: &str, network: &str| Attached {
                interface: interface.into(),
                network: network.parse().unwrap(),
            };
            let attached = vec![
                on("eth0", "10.0.0.1/8"),
                on("cni0", "10.1.0.1/24"),
                on("cni0", "fd00:1::1/64"),
            ];
            Self { root, attached }
        }

        fn set(&self, name: &str, value: &str) {
            let file = self.root.path().join("proc/sys/net/bridge").join(name);
            fs::write(file, value).unwrap();
        }
    }

    #[test]
    fn a_bridge_with_isolated_pods_must_be_filtered() {
        let host = Host::new();
        let mut watch = BridgeWatch::new(host.root.path());
        host.set("bridge-nf-call-iptables", "0\n");
        host.set("bridge-nf-call-ip6tables", "1\n");
        assert_eq!(watch.check(&host.attached, &[]), []);
        let pods = [ip("10.1.0.5"), ip("fd00:1::5")];
        let changes = watch.check(&host.attached, &pods);
        let [BridgeChange::Begins(found)] = &changes[..] else {
            panic!("{changes:?}");
        };
        assert_eq!((found.bridge.as_str(), found.ipv6), ("cni0", false));
        assert_eq!(
            found.to_string(),
            "pod-to-pod IPv4 traffic bypasses NetworkPolicy: \
             net.bridge.bridge-nf-call-iptables is 0; \
             sysctl -w net.bridge.bridge-nf-call-iptables=1"
        );
        assert!(watch.is_unfiltered(false));
        assert!(!watch.is_unfiltered(true));
        assert_eq!(
            unfiltered_networks(host.root.path(), &host.attached),
            ["10.1.0.0/24".parse::<IpNet>().unwrap()]
        );
        assert_eq!(watch.check(&host.attached, &pods), [], "reported once");

        host.set("bridge-nf-call-iptables", "1\n");
        assert_eq!(
            watch.check(&host.attached, &pods),
            [BridgeChange::Ends(found.clone())]
        );
        assert!(!watch.is_unfiltered(false));
        host.set("bridge-nf-call-iptables", "0\n");
        assert_eq!(watch.check(&host.attached, &pods).len(), 1);
        assert_eq!(
            watch.check(&host.attached, &[]),
            [BridgeChange::Ends(found.clone())],
            "no pod is isolated any more"
        );
    }

    #[test]
    fn a_missing_setting_names_the_module() {
        let host = Host::new();
        let mut watch = BridgeWatch::new(host.root.path());
        let changes = watch.check(&host.attached, &[ip("fd00:1::5")]);
        let [BridgeChange::Begins(found)] = &changes[..] else {
            panic!("{changes:?}");
        };
        assert!(found.ipv6);
        assert!(
            found.to_string().ends_with(
                "is missing; modprobe br_netfilter, then \
                 sysctl -w net.bridge.bridge-nf-call-ip6tables=1"
            ),
            "{found}"
        );
    }

    #[test]
    fn a_bridge_can_be_filtered_by_a_setting_of_its_own() {
        let host = Host::new();
        let folder = host.root.path().join("sys/class/net/cni0/bridge");
        fs::write(folder.join("nf_call_iptables"), "1\n").unwrap();
        fs::write(folder.join("nf_call_ip6tables"), "0\n").unwrap();
        let mut watch = BridgeWatch::new(host.root.path());
        let pods = [ip("10.1.0.5"), ip("fd00:1::5")];
        let unfiltered = |watch: &mut BridgeWatch| {
            watch.check(&host.attached, &pods);
            [false, true].map(|ipv6| watch.is_unfiltered(ipv6))
        };
        assert_eq!(unfiltered(&mut watch), [true, true], "no br_netfilter");
        host.set("bridge-nf-call-iptables", "0\n");
        host.set("bridge-nf-call-ip6tables", "0\n");
        assert_eq!(unfiltered(&mut watch), [false, true]);
        fs::write(folder.join("nf_call_ip6tables"), "1\n").unwrap();
        assert_eq!(unfiltered(&mut watch), [false, false]);
    }

    #[test]
    fn each_bridge_with_isolated_pods_is_reported() {
        let mut host = Host::new();
        let folder = |bridge: &str| {
            let net = host.root.path().join("sys/class/net");
            net.join(bridge).join("bridge")
        };
        let (own, other) = (folder("cni0"), folder("cni1"));
        fs::create_dir_all(&other).unwrap();
        fs::write(own.join("nf_call_iptables"), "1\n").unwrap();
        for network in ["10.2.0.1/24", "10.3.0.1/24"] {
            host.attached.push(Attached {
                interface: "cni1".into(),
                network: network.parse().unwrap(),
            });
        }
        host.set("bridge-nf-call-iptables", "0\n");
        let mut watch = BridgeWatch::new(host.root.path());
        let pods = [ip("10.1.0.5"), ip("10.2.0.5"), ip("10.3.0.5")];
        let mut check = || -> Vec<(bool, String)> {
            let changes = watch.check(&host.attached, &pods).into_iter();
            let bridges = changes.map(|change| match change {
                BridgeChange::Begins(unfiltered) => (true, unfiltered.bridge),
                BridgeChange::Ends(unfiltered) => (false, unfiltered.bridge),
            });
            bridges.collect()
        };
        assert_eq!(
            check(),
            [(true, "cni1".into())],
            "the first one is filtered"
        );
        fs::write(own.join("nf_call_iptables"), "0\n").unwrap();
        assert_eq!(check(), [(true, "cni0".into())]);
        fs::write(other.join("nf_call_iptables"), "1\n").unwrap();
        assert_eq!(check(), [(false, "cni1".into())]);
        assert_eq!(check(), []);
        assert!(watch.is_unfiltered(false), "cni0 is not");
    }

    #[test]
    fn routed_pods_need_no_bridge() {
        let host = Host::new();
        let mut watch = BridgeWatch::new(host.root.path());
        // In the network of eth0, which is no bridge.
        assert_eq!(watch.check(&host.attached, &[ip("10.2.0.5")]), []);
    }
}
