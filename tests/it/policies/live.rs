//! Network policies while nftlet runs: changes, connections that stand, restarts, and traffic all
//! the while.

use std::io::ErrorKind;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::support::objects::{namespace, policy};
use crate::support::reach::{Case, Probe, wrong};
use crate::support::shop::{Shop, pod, running_since};
use nftlet_lab::netns::{
    Ask, Client, Daemon, HttpConnection, Machine, Namespace, Protocol, Server, require_net_admin,
    wait_for,
};
use serde_json::{Value, json};

use Probe::{Tcp, Udp};

/// Reached only by a failing test.
const PATIENCE: Duration = nftlet_lab::netns::PATIENCE;
/// How long a request waits that must not arrive; the server counts, so that nothing is missed.
const DROPPED: Duration = Duration::from_millis(10);
/// Where only those ask who must not arrive.
pub(super) const FORBIDDEN: u16 = 9100;

/// nftlet on the shop's node, following the manifests.
fn run(shop: &Shop, more: &[&str]) -> Daemon {
    shop.manifests.run(shop.node(), more)
}

/// Waits until every case gets what it is to get.
#[track_caller]
pub(super) fn become_true(cases: &[Case]) {
    let mut last = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        last = wrong(cases);
        if last.is_empty() {
            return;
        }
    }
    panic!("{}", last.join("\n"));
}

fn closed() -> Value {
    policy("web", web(json!([])))
}

/// A spec for the pod web.
fn web(ingress: Value) -> Value {
    json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": ingress})
}

fn from_app(app: &str) -> Value {
    let peer = json!({"podSelector": {"matchLabels": {"app": app}}});
    web(json!([{"from": [peer]}]))
}

#[test]
fn changes_count_at_once() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let _daemon = run(&shop, &[]);
    let cases = |from_db, from_api| {
        let mut cases = Vec::new();
        for probe in [Tcp(80), Udp(80)] {
            cases.extend(Case::both(&db, &web, probe, from_db));
            cases.extend(Case::both(&api, &web, probe, from_api));
        }
        cases
    };
    become_true(&cases(true, true));
    shop.manifests.put(&closed());
    become_true(&cases(false, false));
    shop.manifests.put(&policy("web", from_app("db")));
    become_true(&cases(true, false));
    shop.manifests.put(&pod("shop", "db", &[("app", "x")], &db));
    become_true(&cases(false, false));
    shop.manifests
        .put(&pod("shop", "db", &[("app", "db")], &db));
    become_true(&cases(true, false));
    let team = json!({"namespaceSelector": {"matchLabels": {"team": "new"}}});
    shop.manifests
        .put(&policy("web", self::web(json!([{"from": [team]}]))));
    become_true(&cases(false, false));
    shop.manifests.put(&namespace("store", &[("team", "new")]));
    become_true(&cases(false, true));
    shop.manifests.remove("Pod", "api");
    become_true(&cases(false, false));
    shop.manifests.remove("NetworkPolicy", "web");
    become_true(&cases(true, true));
    wait_for("the tables to go", PATIENCE, || {
        (!shop.rules().contains("nftlet-policy")).then_some(())
    });
}

#[test]
fn an_isolated_pod_that_comes_is_isolated_from_its_first_packet_on() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    shop.manifests.remove("Pod", "web");
    shop.manifests.put(&closed());
    let to_db = json!({"podSelector": {"matchLabels": {"app": "db"}}, "ingress": [
        {"from": [{"podSelector": {"matchLabels": {"app": "web"}}}]},
    ]});
    shop.manifests.put(&policy("db", to_db));
    let _daemon = run(&shop, &[]);
    become_true(&Case::both(&web, &db, Udp(80), false));
    // No pod is known there.
    become_true(&Case::both(&db, &web, Tcp(80), true));
    let arrived = web.serve(Protocol::Udp, FORBIDDEN);
    let arrived = || arrived.iter().map(Server::served).sum::<u64>();
    shop.manifests
        .put(&pod("shop", "web", &[("app", "web")], &web));
    // Where its address lets it in, it is known, and must be isolated by then.
    let in_by = |address: IpAddr| {
        wait_for("the pod to be known", PATIENCE * 3, || {
            let ask = Ask::udp(address, 80).timeout(Duration::from_millis(100));
            web.ns.run(|| ask.send()).ok()
        });
    };
    db.addresses().into_iter().for_each(in_by);
    let before = arrived();
    for (from, to) in [(&db, web.addresses()), (&api, web.addresses())] {
        for to in to {
            let ask = Ask::udp(to, FORBIDDEN).timeout(DROPPED);
            from.ns.run(|| ask.send()).expect_err("it is isolated");
        }
    }
    assert_eq!(arrived(), before);
    become_true(&Case::both(&db, &web, Tcp(80), false));
}

/// A connection of each family that is used all the time.
fn connections(shop: &Shop) -> (Vec<HttpConnection>, impl Sized) {
    let [web, db, _] = shop.pods();
    let servers = web.serve(Protocol::Http, 9000);
    let client = Client::new(&db.ns);
    let open = web.addresses().map(|address| {
        client.run(move || {
            let ask = Ask::http(address, 9000);
            ask.open().expect("nothing is denied yet")
        })
    });
    (open.into(), servers)
}

#[test]
fn established_connections_are_left_to_end() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, _] = shop.pods();
    let _daemon = run(&shop, &[]);
    let (mut connections, _servers) = connections(&shop);
    shop.manifests.put(&policy(
        "all",
        json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}),
    ));
    become_true(&Case::both(&db, &web, Tcp(80), false));
    for connection in &mut connections {
        for _ in 0..20 {
            connection.ask().expect("the connection stands");
        }
    }
}

/// Requests that never end, until they are stopped: of some all must be answered, of others none
/// may arrive.
pub(super) struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    denied: Arc<AtomicU64>,
    wrong: Arc<Mutex<Vec<String>>>,
    threads: Vec<JoinHandle<()>>,
    forbidden: Vec<Server>,
}

impl Load {
    /// Those from `good` must be answered by `to`, those from `bad` must not arrive there.
    pub(super) fn start(to: &Machine, good: &Machine, bad: &[&Machine]) -> Self {
        let protocols = [Protocol::Tcp, Protocol::Udp];
        let forbidden = protocols.map(|protocol| to.serve(protocol, FORBIDDEN));
        let mut load = Self {
            stop: Arc::default(),
            done: Arc::default(),
            denied: Arc::default(),
            wrong: Arc::default(),
            threads: Vec::new(),
            forbidden: forbidden.into_iter().flatten().collect(),
        };
        load.ask(good, asks(to, 80), true);
        for bad in bad {
            load.ask(bad, asks(to, FORBIDDEN), false);
        }
        load
    }

    fn ask(&mut self, from: &Machine, asks: Vec<Ask>, passes: bool) {
        for ask in asks {
            let ask = ask.timeout(if passes { PATIENCE } else { DROPPED });
            let stop = self.stop.clone();
            let done = if passes { &self.done } else { &self.denied };
            let done = done.clone();
            let (wrong, ns): (_, Namespace) = (self.wrong.clone(), from.ns.clone());
            self.threads.push(thread::spawn(move || {
                ns.enter();
                while !stop.load(Ordering::Relaxed) {
                    let fault = match ask.send() {
                        Ok(_) => (!passes).then(|| "is answered".to_owned()),
                        Err(error) => {
                            let denied = !passes && error.kind() == ErrorKind::TimedOut;
                            (!denied).then(|| error.to_string())
                        }
                    };
                    if let Some(fault) = fault {
                        let mut wrong = wrong.lock().expect("no panic");
                        wrong.push(format!("{ask:?}: {fault}"));
                    }
                    done.fetch_add(1, Ordering::Relaxed);
                }
            }));
        }
    }

    /// Waits until so many more are answered.
    #[track_caller]
    pub(super) fn more(&self, requests: u64) {
        let until = self.done.load(Ordering::Relaxed) + requests;
        wait_for("requests", PATIENCE, || {
            (self.done.load(Ordering::Relaxed) >= until).then_some(())
        });
    }

    #[track_caller]
    pub(super) fn finish(self) {
        wait_for("denied requests", PATIENCE, || {
            (self.denied.load(Ordering::Relaxed) > 100).then_some(())
        });
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("a client ends");
        }
        let wrong = self.wrong.lock().expect("no panic");
        let first: Vec<_> = wrong.iter().take(5).collect();
        let all = self.done.load(Ordering::Relaxed);
        assert!(wrong.is_empty(), "{} beside {all}: {first:#?}", wrong.len());
        let denied = self.denied.load(Ordering::Relaxed);
        let arrived: Vec<u64> = self.forbidden.iter().map(Server::served).collect();
        assert_eq!(arrived, [0; 4], "of {denied}");
    }
}

fn asks(to: &Machine, port: u16) -> Vec<Ask> {
    let to = to.addresses().into_iter();
    to.flat_map(|ip| [Ask::tcp(ip, port), Ask::udp(ip, port)])
        .collect()
}

#[test]
fn a_restart_opens_nothing_and_interrupts_nothing() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    shop.put_and_apply(&policy("web", from_app("db")));
    let load = Load::start(&web, &db, &[&api, shop.lab.client()]);
    for _ in 0..2 {
        let mut daemon = run(&shop, &[]);
        load.more(200);
        // On a busy machine the kernel takes seconds to release an inotify descriptor.
        let status = daemon.stop(PATIENCE);
        assert!(
            status.is_some_and(|s| s.success()),
            "{status:?} {}",
            daemon.log()
        );
        load.more(200);
        let mut crashed = run(&shop, &[]);
        load.more(200);
        crashed.kill();
        load.more(200);
    }
    load.finish();
}

#[test]
fn unrelated_changes_interrupt_no_connection() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    shop.manifests.put(&policy("web", from_app("db")));
    let _daemon = run(&shop, &[]);
    become_true(&Case::both(&api, &web, Tcp(80), false));
    let load = Load::start(&web, &db, &[&api]);
    for round in 0..150_u32 {
        // Pods come and go that the policy selects or lets in, policies that add nothing to it,
        // and the policy itself is written in other words.
        let mut other = pod("shop", "other", &[("app", "db")], &api);
        let address = format!("10.244.1.{}", 100 + round % 3);
        other["status"] = json!({"phase": "Running", "podIPs": [{"ip": address}]});
        let app = if round % 2 == 0 { "db" } else { "web" };
        other["metadata"]["labels"]["app"] = json!(app);
        shop.manifests.put(&other);
        match round % 6 {
            0 => shop.manifests.put(&policy(
                "web",
                web_twice(json!({"podSelector": {"matchLabels": {"app": "db"}}})),
            )),
            2 => shop.manifests.put(&policy("web", from_app("db"))),
            3 => shop.manifests.put(&policy("more", web_port_1())),
            5 => shop.manifests.remove("NetworkPolicy", "more"),
            _ => {}
        }
        load.more(10);
    }
    load.finish();
}

fn web_twice(peer: Value) -> Value {
    let extra = json!({"ports": [{"port": 1}]});
    web(json!([extra, {"from": [{"ipBlock": {"cidr": "192.0.2.0/24"}}, peer]}]))
}

fn web_port_1() -> Value {
    let mut spec = web(json!([{"ports": [{"port": 1, "endPort": 7}]}]));
    spec["podSelector"] = json!({});
    spec["policyTypes"] = json!(["Ingress"]);
    spec["podSelector"]["matchLabels"] = json!({"app": "web"});
    spec
}

#[test]
fn a_pod_stays_isolated_while_its_containers_may_run() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let mut spec = from_app("db");
    spec["egress"] = json!([]);
    spec["policyTypes"] = json!(["Ingress", "Egress"]);
    shop.manifests.put(&policy("web", spec.clone()));
    let running = || running_since(1, pod("shop", "web", &[("app", "web")], &web));
    shop.manifests.put(&running());
    let metrics = "127.0.0.1:10249";
    let _daemon = run(&shop, &["--metrics-bind-address", metrics]);
    let cases = |isolated: bool| {
        [
            Case::both(&db, &web, Tcp(80), true),
            Case::both(&api, &web, Tcp(80), !isolated),
            Case::both(&web, &db, Tcp(80), !isolated),
        ]
        .concat()
    };
    become_true(&cases(true));
    // Evicted: the phase comes before the containers end.
    let mut failed = running();
    failed["status"]["phase"] = json!("Failed");
    shop.manifests.put(&failed);
    // Once a later event has an effect, the one before was handled.
    let seen = |name: &str| {
        let spec = json!({"podSelector": {"matchLabels": {"app": name}}, "ingress": []});
        shop.manifests
            .put(&pod("shop", name, &[("app", name)], &api));
        shop.manifests.put(&policy(name, spec));
        let chain = format!("policy-ingress-shop/{name}");
        wait_for(&chain, PATIENCE, || {
            shop.rules().contains(&chain).then_some(())
        });
        shop.manifests.remove("NetworkPolicy", name);
        wait_for(&chain, PATIENCE, || {
            (!shop.rules().contains(&chain)).then_some(())
        });
    };
    seen("first");
    become_true(&cases(true));
    // Deleted by force.
    shop.manifests.remove("Pod", "web");
    seen("second");
    let wrong = wrong(&cases(true));
    assert!(wrong.is_empty(), "{wrong:?}");
    // Policies go on to count, and another pod at the address ends it.
    shop.manifests.remove("NetworkPolicy", "web");
    become_true(&cases(false));
    shop.manifests.put(&policy("web", spec));
    become_true(&cases(true));
    shop.manifests
        .put(&pod("shop", "next", &[("app", "next")], &web));
    become_true(&cases(false));
}

#[test]
fn rules_removed_by_another_process_are_restored() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, _] = shop.pods();
    shop.manifests.put(&closed());
    let _daemon = run(&shop, &[]);
    become_true(&Case::both(&db, &web, Tcp(80), false));
    for removal in [
        &["flush", "ruleset"][..],
        &["delete", "table", "ip6", "nftlet-policy"],
        &["flush", "chain", "ip", "nftlet-policy", "deny-ingress"],
    ] {
        shop.node().nft(removal);
        become_true(&Case::both(&db, &web, Tcp(80), false));
    }
}
