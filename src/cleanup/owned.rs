//! The names that kube-proxy uses in its modes iptables, ipvs and nftables.
//!
//! The kubelet and kube-router have chains whose names begin with `KUBE-` as well, often in the
//! same table. A name that is not listed here belongs to another program.

/// The name of the tables of the nftables mode, one per family.
pub(super) const KUBE_PROXY_TABLE: &str = "kube-proxy";
/// The tables of iptables in which kube-proxy has chains.
pub(super) const IPTABLES_TABLES: [&str; 4] = ["raw", "mangle", "nat", "filter"];
/// The interface of the ipvs mode, with the addresses of all services.
pub(super) const IPVS_INTERFACE: &str = "kube-ipvs0";
/// Marks packets for masquerading. Other programs jump to it as well, such as the CNI plugin
/// portmap with `externalSetMarkChain`.
pub(super) const MARK_MASQ: &str = "KUBE-MARK-MASQ";
/// Masquerades marked packets.
pub(super) const POSTROUTING: &str = "KUBE-POSTROUTING";
/// Accepts marked packets and replies, whatever the policy of `FORWARD`.
pub(super) const FORWARD: &str = "KUBE-FORWARD";

/// Chains with fixed names.
const CHAINS: [&str; 13] = [
    "KUBE-EXTERNAL-SERVICES",
    FORWARD,
    "KUBE-IPVS-FILTER",
    "KUBE-IPVS-OUT-FILTER",
    "KUBE-LOAD-BALANCER",
    MARK_MASQ,
    "KUBE-NODE-PORT",
    "KUBE-NODEPORTS",
    POSTROUTING,
    "KUBE-PROXY-CANARY",
    "KUBE-PROXY-FIREWALL",
    "KUBE-SERVICES",
    "KUBE-SOURCE-RANGES-FIREWALL",
];

/// The prefixes of the chains of services and endpoints; a hash follows.
const PREFIXES: [&str; 6] = [
    "KUBE-EXT-",
    "KUBE-FW-",
    "KUBE-SEP-",
    "KUBE-SVC-",
    "KUBE-SVL-",
    "KUBE-XLB-",
];

/// The length of that hash, in base 32.
const HASH: usize = 16;

/// The ipsets of the ipvs mode. Those for IPv6 begin with `KUBE-6-` instead.
const IPSETS: [&str; 18] = [
    "CLUSTER-IP",
    "EXTERNAL-IP",
    "EXTERNAL-IP-LOCAL",
    "HEALTH-CHECK-NODE-PORT",
    "IPVS-IPS",
    "LOAD-BALANCER",
    "LOAD-BALANCER-FW",
    "LOAD-BALANCER-LOCAL",
    "LOAD-BALANCER-SOURCE-CIDR",
    "LOAD-BALANCER-SOURCE-IP",
    "LOOP-BACK",
    NODE_PORTS_LOCAL_SCTP,
    "NODE-PORT-LOCAL-TCP",
    "NODE-PORT-LOCAL-UDP",
    NODE_PORTS_SCTP,
    NODE_PORTS_TCP,
    NODE_PORTS_UDP,
    "NODE-PORT-SCTP",
];
const NODE_PORTS_LOCAL_SCTP: &str = "NODE-PORT-LOCAL-SCTP-HASH";
const NODE_PORTS_SCTP: &str = "NODE-PORT-SCTP-HASH";
const NODE_PORTS_TCP: &str = "NODE-PORT-TCP";
const NODE_PORTS_UDP: &str = "NODE-PORT-UDP";

/// The longest name of an ipset; kube-proxy truncates longer ones.
const LONGEST_IPSET: usize = 31;

/// Returns whether a chain of iptables is kube-proxy's.
pub(super) fn is_chain(name: &str) -> bool {
    let hash = |rest: &str| {
        rest.len() == HASH
            && rest
                .bytes()
                .all(|byte| matches!(byte, b'A'..=b'Z' | b'2'..=b'7'))
    };
    CHAINS.contains(&name)
        || PREFIXES
            .iter()
            .any(|prefix| name.strip_prefix(prefix).is_some_and(hash))
}

/// Returns whether an ipset is kube-proxy's.
pub(super) fn is_ipset(name: &str) -> bool {
    IPSETS.iter().any(|own| {
        let v6 = format!("KUBE-6-{own}");
        let cut = v6.get(..LONGEST_IPSET).unwrap_or(&v6);
        name.strip_prefix("KUBE-") == Some(own) || name == cut
    })
}

/// Returns the protocol of an ipset of kube-proxy with NodePorts.
pub(super) fn node_ports(name: &str) -> Option<&'static str> {
    let name = name.strip_prefix("KUBE-")?;
    match name.strip_prefix("6-").unwrap_or(name) {
        NODE_PORTS_TCP => Some("TCP"),
        NODE_PORTS_UDP => Some("UDP"),
        NODE_PORTS_SCTP => Some("SCTP"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_of_others_are_not_kube_proxys() {
        for own in [
            "KUBE-SERVICES",
            "KUBE-SVC-ERIFXISQEP7F7OF4",
            "KUBE-SEP-6E7XQMQ4RAYOWTTM",
            "KUBE-XLB-ERIFXISQEP7F7OF4",
            "KUBE-PROXY-CANARY",
        ] {
            assert!(is_chain(own), "{own}");
        }
        for other in [
            "KUBE-FIREWALL",
            "KUBE-KUBELET-CANARY",
            "KUBE-MARK-DROP",
            "KUBE-IPTABLES-HINT",
            "KUBE-ROUTER-INPUT",
            "KUBE-ROUTER-SERVICES",
            "KUBE-NWPLCY-DEFAULT",
            "KUBE-NWPLCY-ERIFXISQEP7F7OF4",
            "KUBE-POD-FW-ERIFXISQEP7F7OF4",
            "KUBE-SVC-",
            "KUBE-SVC-SHORT",
            "KUBE-SVC-ERIFXISQEP7F7OF4X",
            "KUBE-SVC-erifxisqep7f7of4",
            "MY-KUBE-SERVICES",
            "DOCKER",
            "",
        ] {
            assert!(!is_chain(other), "{other}");
        }
    }

    #[test]
    fn ipsets_of_both_families_are_known() {
        for own in [
            "KUBE-CLUSTER-IP",
            "KUBE-6-CLUSTER-IP",
            "KUBE-LOAD-BALANCER-SOURCE-CIDR",
            "KUBE-6-LOAD-BALANCER-SOURCE-CID",
        ] {
            assert!(is_ipset(own), "{own}");
        }
        for other in [
            "KUBE-SRC-ABC",
            "KUBE-DST-ABC",
            "cali40all-ipam",
            "KUBE-",
            "",
        ] {
            assert!(!is_ipset(other), "{other}");
        }
        assert_eq!(node_ports("KUBE-NODE-PORT-TCP"), Some("TCP"));
        assert_eq!(node_ports("KUBE-6-NODE-PORT-SCTP-HASH"), Some("SCTP"));
        assert_eq!(node_ports("KUBE-CLUSTER-IP"), None);
    }
}
