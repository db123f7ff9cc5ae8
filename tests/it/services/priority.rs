//! The priority of packets, which the rules use for a moment.

use nftlet_lab::netns::{Ask, Client, Namespace, require_net_admin};

use crate::services::packets::{CIDR, Shop, ip};

/// Gives each packet a priority that is also a number of frontends, before the rules of services,
/// and counts those with and without it behind them, in one family.
const OBSERVER: &str = "
table FAMILY observer {
    counter output-own { }
    counter output-none { }
    counter output-other { }
    counter forward-own { }
    counter forward-none { }
    counter forward-other { }
    chain before-output {
        type filter hook output priority -150; policy accept;
        meta priority set 8:0
    }
    chain before-prerouting {
        type filter hook prerouting priority -150; policy accept;
        meta priority set 8:0
    }
    chain output {
        type filter hook output priority 300; policy accept;
        tcp dport != 8080 return
        meta priority 8:0 counter name output-own return
        meta priority none counter name output-none return
        counter name output-other
    }
    chain forward {
        type filter hook forward priority 300; policy accept;
        tcp dport != 8080 return
        meta priority 8:0 counter name forward-own return
        meta priority none counter name forward-none return
        counter name forward-other
    }
}
";

/// Asks for something and returns how many packets passed a hook meanwhile with a priority of their
/// own, without one, and with another. The last packets of an earlier connection may count, too.
fn passed(node: &Namespace, hook: &str, ask: Ask, from: &Client) -> [u64; 3] {
    let family = if ask.to().is_ipv6() { "ip6" } else { "ip" };
    let counts = || {
        ["own", "none", "other"].map(|kind| {
            let name = format!("{hook}-{kind}");
            let text = node.nft(&["list", "counter", family, "observer", &name]);
            let (_, rest) = text.split_once("packets ").expect("a counter");
            let number = rest.split_whitespace().next();
            number.and_then(|it| it.parse().ok()).expect("a number")
        })
    };
    let before: [u64; 3] = counts();
    from.ask(ask)
        .unwrap_or_else(|error| panic!("{ask:?}: {error}"));
    let after: [u64; 3] = counts();
    [0, 1, 2].map(|place| after[place] - before[place])
}

#[test]
fn only_the_first_packet_to_a_service_loses_its_priority() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open(&CIDR);
    let node = shop.node();
    for family in ["ip", "ip6"] {
        node.nft_load(&OBSERVER.replace("FAMILY", family));
    }
    let own = Client::new(node);
    for address in ["10.96.0.10", "fd00:10:96::a"].map(ip) {
        let [kept, cleared, other] = passed(node, "output", Ask::tcp(address, 80), &own);
        assert_eq!((cleared, other), (1, 0), "{address}");
        assert!(kept >= 2, "{address}: {kept}");
    }
    // Without a frontend, the priority is neither changed nor looked up: 8:0 is a rejection.
    for pod in shop.lab.pods()[0].addresses() {
        let [kept, cleared, other] = passed(node, "output", Ask::tcp(pod, 8080), &own);
        assert_eq!((cleared, other), (0, 0), "{pod}");
        assert!(kept >= 3, "{pod}: {kept}");
    }
    let client = Client::new(&shop.lab.client().ns);
    let ask = Ask::tcp(ip("2001:db8:1::10"), 80);
    let [kept, cleared, other] = passed(node, "forward", ask, &client);
    assert_eq!((cleared, other), (1, 0));
    assert!(kept >= 2, "{kept}");
    // The kernel derives the priority of forwarded IPv4 from the TOS field.
    let ask = Ask::tcp(ip("203.0.113.10"), 80);
    let [kept, cleared, other] = passed(node, "forward", ask, &client);
    assert_eq!((kept, other), (0, 0));
    assert!(cleared >= 3, "{cleared}");
}
