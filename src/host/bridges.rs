//! Bridges on which traffic between pods of this node bypasses network policies.
//!
//! With many network plugins the pods of a node are ports of one Linux bridge. Packets between them
//! are switched, not routed. They pass the forward hook, where policies are enforced, only while
//! br_netfilter is loaded and its setting for the family is 1, for all bridges or for this one.
//!
//! [`Watch::look`] compares the isolated pods with the bridges of the host and returns what changed.
//! It changes no setting, since that would concern all bridges of the host.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use super::addresses::Attached;

/// A bridge on which traffic of isolated pods bypasses their policies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfiltered {
    /// The bridge.
    pub bridge: String,
    /// Whether it is about IPv6.
    pub ipv6: bool,
    /// The current setting; `None` without br_netfilter.
    pub setting: Option<String>,
}

impl Unfiltered {
    fn key(&self) -> &'static str {
        if self.ipv6 {
            "net.bridge.bridge-nf-call-ip6tables"
        } else {
            "net.bridge.bridge-nf-call-iptables"
        }
    }

    /// The file with the setting of a single bridge.
    fn of_bridge(&self) -> &'static str {
        if self.ipv6 {
            "nf_call_ip6tables"
        } else {
            "nf_call_iptables"
        }
    }

    /// The name of the family.
    pub fn family(&self) -> &'static str {
        if self.ipv6 { "IPv6" } else { "IPv4" }
    }
}

impl fmt::Display for Unfiltered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (family, key) = (self.family(), self.key());
        write!(
            f,
            "{family} between pods of this node passes the network policies by on this bridge, \
             because {key} is "
        )?;
        match &self.setting {
            Some(value) => write!(f, "{value}; sysctl -w {key}=1"),
            None => write!(
                f,
                "missing; modprobe br_netfilter and then sysctl -w {key}=1"
            ),
        }
    }
}

/// A difference from the previous look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// Traffic bypasses the policies.
    Begins(Unfiltered),
    /// It no longer does.
    Ends(Unfiltered),
}

/// Remembers what the previous look found.
#[derive(Debug)]
pub struct Watch {
    root: PathBuf,
    /// By the name of the bridge, and whether it is about IPv6.
    found: BTreeMap<(String, bool), Unfiltered>,
}

impl Watch {
    /// Creates a watch over the files below a root directory (`/`), without a previous look.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            found: BTreeMap::new(),
        }
    }

    /// Looks at the settings of the bridges, given the addresses of the host's interfaces and of the
    /// isolated pods, and returns what changed.
    pub fn look(&mut self, attached: &[Attached], pods: &[IpAddr]) -> Vec<News> {
        let found = all_unfiltered(&self.root, attached, pods);
        let mut before = std::mem::replace(&mut self.found, found.clone());
        let mut news = Vec::new();
        for (place, unfiltered) in found {
            if before.remove(&place).as_ref() != Some(&unfiltered) {
                news.push(News::Begins(unfiltered));
            }
        }
        news.extend(before.into_values().map(News::Ends));
        news
    }

    /// Returns whether the last look found a bridge on which traffic of a family bypasses policies.
    pub fn is_unfiltered(&self, ipv6: bool) -> bool {
        self.found.keys().any(|(_, of_ipv6)| *of_ipv6 == ipv6)
    }
}

/// Returns the bridges with isolated pods whose packets are not filtered.
fn all_unfiltered(
    root: &Path,
    attached: &[Attached],
    pods: &[IpAddr],
) -> BTreeMap<(String, bool), Unfiltered> {
    let mut found = BTreeMap::new();
    for Attached { interface, network } in attached {
        let place = (interface.clone(), network.addr().is_ipv6());
        let has_pods = pods.iter().any(|pod| network.contains(pod));
        if has_pods
            && !found.contains_key(&place)
            && let Some(unfiltered) = unfiltered(root, interface, place.1)
        {
            found.insert(place, unfiltered);
        }
    }
    found
}

/// Returns an interface if it is a bridge whose packets are not filtered.
fn unfiltered(root: &Path, interface: &str, ipv6: bool) -> Option<Unfiltered> {
    let folder = root.join("sys/class/net").join(interface).join("bridge");
    if !folder.is_dir() {
        return None;
    }
    let found = Unfiltered {
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
    (!filtered).then_some(Unfiltered { setting, ..found })
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
        let mut watch = Watch::new(host.root.path());
        host.set("bridge-nf-call-iptables", "0\n");
        host.set("bridge-nf-call-ip6tables", "1\n");
        assert_eq!(watch.look(&host.attached, &[]), []);
        let pods = [ip("10.1.0.5"), ip("fd00:1::5")];
        let news = watch.look(&host.attached, &pods);
        let [News::Begins(found)] = &news[..] else {
            panic!("{news:?}");
        };
        assert_eq!((found.bridge.as_str(), found.ipv6), ("cni0", false));
        assert_eq!(
            found.to_string(),
            "IPv4 between pods of this node passes the network policies by on this bridge, \
             because net.bridge.bridge-nf-call-iptables is 0; \
             sysctl -w net.bridge.bridge-nf-call-iptables=1"
        );
        assert!(watch.is_unfiltered(false));
        assert!(!watch.is_unfiltered(true));
        assert_eq!(watch.look(&host.attached, &pods), [], "it is told once");

        host.set("bridge-nf-call-iptables", "1\n");
        assert_eq!(
            watch.look(&host.attached, &pods),
            [News::Ends(found.clone())]
        );
        assert!(!watch.is_unfiltered(false));
        host.set("bridge-nf-call-iptables", "0\n");
        assert_eq!(watch.look(&host.attached, &pods).len(), 1);
        assert_eq!(
            watch.look(&host.attached, &[]),
            [News::Ends(found.clone())],
            "nobody is isolated any more"
        );
    }

    #[test]
    fn a_missing_setting_names_the_module() {
        let host = Host::new();
        let mut watch = Watch::new(host.root.path());
        let news = watch.look(&host.attached, &[ip("fd00:1::5")]);
        let [News::Begins(found)] = &news[..] else {
            panic!("{news:?}");
        };
        assert!(found.ipv6);
        assert!(
            found.to_string().ends_with(
                "is missing; modprobe br_netfilter and then \
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
        let mut watch = Watch::new(host.root.path());
        let pods = [ip("10.1.0.5"), ip("fd00:1::5")];
        let unfiltered = |watch: &mut Watch| {
            watch.look(&host.attached, &pods);
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
    fn each_bridge_with_isolated_pods_is_told_of() {
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
        let mut watch = Watch::new(host.root.path());
        let pods = [ip("10.1.0.5"), ip("10.2.0.5"), ip("10.3.0.5")];
        let mut look = || -> Vec<(bool, String)> {
            let news = watch.look(&host.attached, &pods).into_iter();
            let told = news.map(|news| match news {
                News::Begins(unfiltered) => (true, unfiltered.bridge),
                News::Ends(unfiltered) => (false, unfiltered.bridge),
            });
            told.collect()
        };
        assert_eq!(look(), [(true, "cni1".into())], "the first one is filtered");
        fs::write(own.join("nf_call_iptables"), "0\n").unwrap();
        assert_eq!(look(), [(true, "cni0".into())]);
        fs::write(other.join("nf_call_iptables"), "1\n").unwrap();
        assert_eq!(look(), [(false, "cni1".into())]);
        assert_eq!(look(), []);
        assert!(watch.is_unfiltered(false), "cni0 is not");
    }

    #[test]
    fn routed_pods_need_no_bridge() {
        let host = Host::new();
        let mut watch = Watch::new(host.root.path());
        // In the network of eth0, which is no bridge.
        assert_eq!(watch.look(&host.attached, &[ip("10.2.0.5")]), []);
    }
}
