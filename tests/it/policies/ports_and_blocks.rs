//! Ports and blocks of addresses.

use std::time::Duration;

use crate::support::objects::policy;
use crate::support::reach::{Case, Probe, check_counted};
use crate::support::shop::{Shop, pod};
use crate::support::skip::skip;
use nftlet_lab::netns::{Ask, Machine, Protocol, require_net_admin};
use serde_json::{Value, json};

use Probe::{Ping, Tcp, Udp};

#[test]
fn ports_are_numbers_ranges_and_names() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, _] = shop.pods();
    let node = shop.lab.node().ns();
    let through = |ports: Value, passing: &[Probe]| {
        let spec = json!({
            "podSelector": {"matchLabels": {"app": "web"}},
            "ingress": [{"ports": ports, "from": [{"podSelector": {}}]}],
        });
        shop.put_and_apply(&policy("ports", spec));
        let mut cases = Vec::new();
        for probe in [Tcp(80), Tcp(8080), Udp(80), Udp(8080), Ping] {
            cases.extend(Case::both(&db, &web, probe, passing.contains(&probe)));
        }
        check_counted(&[node], &cases);
    };
    through(json!([{"port": 80}]), &[Tcp(80)]);
    through(json!([{"port": 80, "protocol": "UDP"}]), &[Udp(80)]);
    through(json!([{"protocol": "UDP"}]), &[Udp(80), Udp(8080)]);
    through(json!([{"port": 81, "endPort": 8080}]), &[Tcp(8080)]);
    through(json!([{"port": 80, "endPort": 8079}]), &[Tcp(80)]);
    through(
        json!([{"port": 80, "endPort": 80}, {"port": 8080, "protocol": "UDP"}]),
        &[Tcp(80), Udp(8080)],
    );
    // The name of the port in the pod, for its protocol.
    through(json!([{"port": "http"}]), &[Tcp(8080)]);
    through(json!([{"port": "http", "protocol": "UDP"}]), &[]);
    through(json!([]), &[Tcp(80), Tcp(8080), Udp(80), Udp(8080), Ping]);
}

#[test]
fn a_named_port_moves_with_the_destination() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let node = shop.lab.node().ns();
    let named = |name: &str, machine: &Machine, port: u16| {
        let mut object = pod("shop", name, &[("app", name)], machine);
        object["spec"]["containers"][0]["ports"] = json!([{"name": "http", "containerPort": port}]);
        object
    };
    shop.manifests.put(&named("web", &web, 80));
    let spec = json!({
        "podSelector": {"matchLabels": {"app": "db"}},
        "policyTypes": ["Egress"],
        "egress": [{"ports": [{"port": "http"}]}],
    });
    shop.put_and_apply(&policy("named", spec));
    let cases = |web_at_80, api_at_80| {
        let mut cases = Vec::new();
        for (to, at_80) in [(&web, web_at_80), (&api, api_at_80)] {
            cases.extend(Case::both(&db, to, Tcp(80), at_80));
            cases.extend(Case::both(&db, to, Tcp(8080), !at_80));
        }
        // Outside nothing has a name.
        cases.extend(Case::both(&db, shop.lab.client(), Tcp(80), false));
        cases
    };
    check_counted(&[node], &cases(true, false));
    shop.put_and_apply(&named("web", &web, 8080));
    check_counted(&[node], &cases(false, false));
}

#[test]
fn blocks_match_untranslated_addresses_of_their_own_family() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let (client, node) = (shop.lab.client(), shop.lab.node().ns());
    let from = |blocks: Value, passing: &[(&Machine, bool, bool)]| {
        let spec = json!({
            "podSelector": {"matchLabels": {"app": "web"}},
            "ingress": [{"from": blocks}],
        });
        shop.put_and_apply(&policy("blocks", spec));
        let cases = passing.iter().flat_map(|(from, v4, v6)| {
            let [mut a, mut b] = Case::both(from, &web, Tcp(80), true);
            (a.passes, b.passes) = (*v4, *v6);
            [a, b]
        });
        check_counted(&[node], &cases.collect::<Vec<_>>());
    };
    from(
        json!([{"ipBlock": {"cidr": "0.0.0.0/0"}}]),
        &[
            (client, true, false),
            (&db, true, false),
            (&api, true, false),
        ],
    );
    let except = json!([format!("{}/32", db.v4), "192.168.10.96/29"]);
    from(
        json!([{"ipBlock": {"cidr": "0.0.0.0/0", "except": except}}]),
        &[
            (client, false, false),
            (&db, false, false),
            (&api, true, false),
        ],
    );
    let except = json!([format!("{}/128", client.v6)]);
    from(
        json!([{"ipBlock": {"cidr": "::/0", "except": except}}]),
        &[
            (client, false, false),
            (&db, false, true),
            (&api, false, true),
        ],
    );
    // What one entry excepts another one may allow.
    from(
        json!([
            {"ipBlock": {"cidr": "10.244.0.0/16", "except": ["10.244.1.0/24"]}},
            {"ipBlock": {"cidr": format!("{}/32", db.v4)}},
            {"ipBlock": {"cidr": "fd00:10:244::/48"}},
        ]),
        &[
            (client, false, false),
            (&db, true, true),
            (&api, false, true),
        ],
    );
}

#[test]
fn exceptions_of_a_block_hold_for_egress_too() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let (client, node) = (shop.lab.client(), &shop.lab.node().machine);
    let without = |cidr: &str, addresses: [String; 2]| json!({"ipBlock": {"cidr": cidr, "except": addresses}});
    let spec = json!({
        "podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Egress"],
        "egress": [{"to": [
            without("0.0.0.0/0", [format!("{}/32", db.v4), format!("{}/32", node.v4)]),
            without("::/0", [format!("{}/128", db.v6), format!("{}/128", node.v6)]),
        ]}],
    });
    shop.put_and_apply(&policy("out", spec));
    let cases = [
        Case::both(&web, &db, Tcp(80), false),
        Case::both(&web, node, Tcp(80), false),
        Case::both(&web, &api, Tcp(80), true),
        Case::both(&web, client, Tcp(80), true),
    ];
    check_counted(&[&node.ns], &cases.concat());
}

#[test]
fn many_ports_and_peers_of_one_rule_are_all_asked_for() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let node = shop.lab.node().ns();
    let through = |ports: Value, passing: &[Probe]| {
        let spec = json!({
            "podSelector": {"matchLabels": {"app": "web"}},
            "ingress": [{"ports": ports, "from": [
                {"podSelector": {"matchLabels": {"app": "nobody"}}},
                {"podSelector": {"matchLabels": {"app": "db"}}},
                {"ipBlock": {"cidr": "192.0.2.0/24"}},
            ]}],
        });
        shop.put_and_apply(&policy("ports", spec));
        let mut cases = Vec::new();
        for probe in [Tcp(80), Tcp(8080), Udp(80), Udp(8080), Ping] {
            cases.extend(Case::both(&db, &web, probe, passing.contains(&probe)));
            cases.extend(Case::both(&api, &web, probe, false));
        }
        check_counted(&[node], &cases);
    };
    let udp = |port: u16| json!({"port": port, "protocol": "UDP"});
    through(
        json!([{"port": 80}, {"port": 443}, udp(8080)]),
        &[Tcp(80), Udp(8080)],
    );
    through(
        json!([{"port": 79, "endPort": 81}, {"port": 9000}, {"protocol": "UDP"}]),
        &[Tcp(80), Udp(80), Udp(8080)],
    );
    through(
        json!([{"port": "http"}, {"port": "more"}, udp(80), {"port": 443}]),
        &[Tcp(8080), Udp(80)],
    );
}

#[test]
fn sctp_is_judged_by_its_ports() {
    if !require_net_admin() {
        return;
    }
    if !Protocol::Sctp.supported() {
        skip("sctp", "the kernel lacks it; load the module sctp");
        return;
    }
    let shop = Shop::open();
    let [web, db, _] = shop.pods();
    let node = shop.lab.node().ns();
    let _servers = [80, 8080].map(|port| web.serve(Protocol::Sctp, port));
    let spec = json!({
        "podSelector": {"matchLabels": {"app": "web"}},
        "ingress": [{"ports": [{"port": 80, "protocol": "SCTP"}, {"port": 8080}]}],
    });
    shop.put_and_apply(&policy("sctp", spec));
    for address in web.addresses() {
        let ask = |port, timeout| {
            let ask = Ask::sctp(address, port).timeout(Duration::from_millis(timeout));
            db.ns.run(|| ask.send())
        };
        ask(80, 20_000).expect("this port is allowed");
        ask(8080, 300).expect_err("this is the port of TCP");
    }
    check_counted(&[node], &Case::both(&db, &web, Tcp(8080), true));
}
