//! The priority of packets, which the rules use for a moment.

use nftlet_lab::netns::{Ask, Client, Namespace, require_net_admin};

use crate::services::packets::{CIDR, Shop, ip};

/// Gives each packet a priority that is also a number of frontends, before the rules of services,
/// and counts those with and without it when they leave.
const OBSERVER: &str = "
table inet observer {
    counter own { }
    counter none { }
    counter other { }
    chain before-output {
        type filter hook output priority -150; policy accept;
        meta priority set 8:0
    }
    chain before-prerouting {
        type filter hook prerouting priority -150; policy accept;
        meta priority set 8:0
    }
    chain leaving {
        type filter hook postrouting priority 300; policy accept;
        tcp dport != 8080 return
        meta priority 8:0 counter name own return
        meta priority none counter name none return
        counter name other
    }
}
";

/// Returns the packets with a priority of their own, without one, and with another.
fn counts(node: &Namespace) -> [u64; 3] {
    ["own", "none", "other"].map(|name| {
        let text = node.nft(&["list", "counter", "inet", "observer", name]);
        let (_, rest) = text.split_once("packets ").expect("a counter");
        let number = rest.split_whitespace().next();
        number.and_then(|it| it.parse().ok()).expect("a number")
    })
}

#[test]
fn only_the_first_packet_to_a_service_loses_its_priority() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open(&CIDR);
    let node = shop.node();
    node.nft_load(OBSERVER);
    let before = |ask: Ask, from: &Client| {
        let before = counts(node);
        from.ask(ask)
            .unwrap_or_else(|error| panic!("{ask:?}: {error}"));
        let after = counts(node);
        [0, 1, 2].map(|place| after[place] - before[place])
    };
    let own = Client::new(node);
    for address in ["10.96.0.10", "fd00:10:96::a"].map(ip) {
        let [kept, cleared, other] = before(Ask::tcp(address, 80), &own);
        assert_eq!((cleared, other), (1, 0), "{address}");
        assert!(kept >= 2, "{address}: {kept}");
    }
    // Without a frontend, the priority is neither changed nor looked up: 8:0 is a rejection.
    for pod in shop.lab.pods()[0].addresses() {
        let [kept, cleared, other] = before(Ask::tcp(pod, 8080), &own);
        assert_eq!((cleared, other), (0, 0), "{pod}");
        assert!(kept >= 3, "{pod}: {kept}");
    }
    let client = Client::new(&shop.lab.client().ns);
    let [kept, cleared, other] = before(Ask::tcp(ip("2001:db8:1::10"), 80), &client);
    assert_eq!((cleared, other), (1, 0));
    assert!(kept >= 2, "{kept}");
    // The kernel derives the priority of forwarded IPv4 from the TOS field.
    let [kept, _, other] = before(Ask::tcp(ip("203.0.113.10"), 80), &client);
    assert_eq!((kept, other), (0, 0));
}
