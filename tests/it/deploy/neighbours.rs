//! A host full of rules of others and of kube-proxy's.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use crate::support::kube_proxy::{self, Frontend, Iptables, legacy_iptables};
use crate::support::skip::skip;
use nftlet_lab::netns::Namespace;

const NODES: [&str; 2] = ["192.168.10.1", "fd00:192:168:10::1"];
const PODS: [&str; 2] = ["10.244.0.0/16", "fd00:10:244::/48"];
const RANGES: [&str; 2] = ["10.96.0.0/16", "fd00:10:96::/112"];

/// Rules of Docker, Calico, kube-router, the kubelet and an administrator, as on a real node. Most
/// of them are there to be mistaken for kube-proxy's.
const OTHERS: &str = r#"*raw
:cali-PREROUTING - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
-A PREROUTING -m comment --comment "cali:6gwbT8clXdHdC1b1" -j cali-PREROUTING
-A cali-PREROUTING -m comment --comment "cali:XFX5xbM8B9qR10JG" -j MARK --set-xmark 0x0/0xf0000
COMMIT
*mangle
:KUBE-IPTABLES-HINT - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:cali-PREROUTING - [0:0]
-A PREROUTING -m comment --comment "cali:6gwbT8clXdHdC1b1" -j cali-PREROUTING
-A cali-PREROUTING -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
*nat
:DOCKER - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-MARK-DROP - [0:0]
:KUBE-ROUTER-SERVICES - [0:0]
:cali-nat-outgoing - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A PREROUTING -m comment --comment "say \"no\" -j KUBE-SERVICES" -j KUBE-ROUTER-SERVICES
-A OUTPUT ! -d LOOPBACK -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s DOCKER_NET ! -o docker0 -j MASQUERADE
-A POSTROUTING -m comment --comment "cali:Z-c7XtVd2Bq7s_hA" -j cali-nat-outgoing
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8443 -j DNAT --to-destination DOCKER_HOST
-A KUBE-MARK-DROP -j MARK --set-xmark 0x8000/0x8000
-A KUBE-ROUTER-SERVICES -m mark --mark 0x4000/0x4000 -j RETURN
COMMIT
*filter
:DOCKER-USER - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-NWPLCY-4XTQXYC6Z3VVKDZ5 - [0:0]
:KUBE-POD-FW-ERIFXISQEP7F7OF4 - [0:0]
:KUBE-ROUTER-FORWARD - [0:0]
:cali-FORWARD - [0:0]
-A INPUT -j KUBE-FIREWALL
-A INPUT -p tcp -m tcp --dport 22 -m comment --comment "KUBE-SERVICES" -j ACCEPT
-A FORWARD -m comment --comment "cali:wUHhoiAYhphO9Mso" -j cali-FORWARD
-A FORWARD -m comment --comment "kube-router netpol - TEMCG2JMVZWTQI7X" -j KUBE-ROUTER-FORWARD
-A FORWARD -j DOCKER-USER
-A OUTPUT -j KUBE-FIREWALL
-A DOCKER-USER -j RETURN
-A KUBE-FIREWALL -m mark --mark 0x8000/0x8000 -j DROP
-A KUBE-NWPLCY-4XTQXYC6Z3VVKDZ5 -j MARK --set-xmark 0x10000/0x10000
-A KUBE-POD-FW-ERIFXISQEP7F7OF4 -j KUBE-NWPLCY-4XTQXYC6Z3VVKDZ5
-A KUBE-ROUTER-FORWARD -d POD -j KUBE-POD-FW-ERIFXISQEP7F7OF4
COMMIT
"#;

/// Tables of others in nftables, two of them with names to be mistaken.
const OTHER_TABLES: &str = r#"
table inet firewalld {
    set kube-proxy { type ipv4_addr; elements = { 10.96.0.10, 10.96.0.20 }; }
    chain filter_INPUT {
        type filter hook input priority 10; policy accept;
        ct state { established, related } accept
        ip saddr @kube-proxy counter drop
        jump KUBE-SERVICES
    }
    chain KUBE-SERVICES { tcp dport 22 accept comment "kube-proxy"; }
}

table inet kube-proxy {
    chain mine { type filter hook input priority 20; }
}
table ip nftlet-notes {
    chain KUBE-SERVICES { }
}
table ip6 my-kube-proxy {
    map m { type inet_service : verdict; elements = { 80 : drop }; }
}
"#;

fn others(v6: bool) -> String {
    let [network, host, pod] = if v6 {
        [
            "fd00:172:17::/64",
            "[fd00:172:17::2]:443",
            "fd00:10:244:1::11/128",
        ]
    } else {
        ["172.17.0.0/16", "172.17.0.2:443", "10.244.1.11/32"]
    };
    OTHERS
        .replace("DOCKER_NET", network)
        .replace("DOCKER_HOST", host)
        .replace("LOOPBACK", if v6 { "::1/128" } else { "127.0.0.0/8" })
        .replace("-d POD", &format!("-d {pod}"))
}

/// A service with three endpoints and a NodePort, one with one endpoint, one with none.
fn frontends(v6: bool) -> Vec<Frontend> {
    let (service, pod) = if v6 {
        ("fd00:10:96::", "fd00:10:244:1::")
    } else {
        ("10.96.0.", "10.244.1.")
    };
    let at = |prefix: &str, last: u8, port: u16| {
        let ip: IpAddr = format!("{prefix}{last}").parse().expect("an address");
        SocketAddr::new(ip, port)
    };
    let endpoints = |count: u8| (11..11 + count).map(|last| at(pod, last, 8080)).collect();
    [
        ("web", 10, 3, Some(30080)),
        ("db", 20, 1, None),
        ("empty", 30, 0, None),
    ]
    .map(|(name, last, count, node_port)| Frontend {
        name: format!("shop/{name}:http"),
        cluster: at(service, last, 80),
        node_port,
        endpoints: endpoints(count),
    })
    .to_vec()
}

fn node_ip(v6: bool) -> IpAddr {
    NODES[usize::from(v6)].parse().expect("an address")
}

pub fn kube_proxy_iptables(v6: bool) -> String {
    kube_proxy::iptables(node_ip(v6), PODS[usize::from(v6)], &frontends(v6))
}

pub fn kube_proxy_nftables() -> String {
    [false, true]
        .map(|v6| {
            let index = usize::from(v6);
            kube_proxy::nftables(node_ip(v6), PODS[index], RANGES[index], &frontends(v6))
        })
        .concat()
}

/// The iptables that the kernel and the host have.
pub fn kinds() -> Vec<Iptables> {
    match legacy_iptables(&Namespace::new("probe")) {
        Ok(()) => vec![Iptables::Legacy, Iptables::Nft],
        Err(why) => {
            skip("legacy-iptables", &why);
            vec![Iptables::Nft]
        }
    }
}

/// Everything that a host has, by place, without counters.
pub fn everything(node: &Namespace, kinds: &[Iptables]) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    for kind in kinds {
        for v6 in [false, true] {
            all.insert(kind.program(v6, ""), kind.save(node, v6));
        }
    }
    all.insert("nftables".into(), node.nft(&["-s", "list", "ruleset"]));
    all.insert("ipsets".into(), node.feed("ipset", &["save"], ""));
    all.insert("links".into(), node.feed("ip", &["-br", "link"], ""));
    all
}

/// Compares place by place and line by line.
#[track_caller]
pub fn assert_same(found: &BTreeMap<String, String>, wanted: &BTreeMap<String, String>) {
    for (place, wanted) in wanted {
        let found = &found[place];
        let lines = |text: &str, other: &str| -> Vec<String> {
            let lines = text
                .lines()
                .filter(|line| !other.lines().any(|o| o == *line));
            lines.map(str::to_owned).collect()
        };
        assert!(
            found == wanted,
            "{place}: too much: {:#?}, too little: {:#?}",
            lines(found, wanted),
            lines(wanted, found)
        );
    }
}

/// A host with the rules of others in every kind of iptables, in nftables, and as ipsets.
pub fn host(kinds: &[Iptables]) -> Namespace {
    let node = Namespace::new("node");
    for kind in kinds {
        for v6 in [false, true] {
            kind.load(&node, v6, &others(v6));
        }
    }
    node.nft_load(OTHER_TABLES);
    node.feed(
        "ipset",
        &["restore"],
        "create KUBE-SRC-ABC hash:ip\ncreate cali40all hash:ip\n",
    );
    node
}

/// What kube-proxy adds to that.
pub fn add_kube_proxy(node: &Namespace, kinds: &[Iptables]) {
    for kind in kinds {
        for v6 in [false, true] {
            kind.load(node, v6, &kube_proxy_iptables(v6));
        }
    }
    node.nft_load(&kube_proxy_nftables());
}
