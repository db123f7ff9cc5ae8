//! Packets: connections that strict policies cut.

use std::io::{self};
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::observe::{LONG, LOST, PORT, SILENCE, Shop, put_pod, scrape};
use nftlet_lab::netns::{Ask, HttpConnection, Machine, drain, require_net_admin, wait_for};
use serde_json::json;

/// A UDP client that asks from one socket for all of its life.
struct Datagrams(UdpSocket);

impl Datagrams {
    fn new(from: &Machine, to: SocketAddr) -> Self {
        let socket = from.ns.run(|| {
            let socket = UdpSocket::bind((from.address_like(to.ip()), 0))?;
            socket.connect(to)?;
            io::Result::Ok(socket)
        });
        Self(socket.unwrap())
    }

    /// Sends a datagram, before which nothing waits any more.
    fn send(&self) {
        drain(&self.0);
        // A refusal that came since is reported here; what counts is the answer.
        let _ = self.0.send(b"?\n");
    }

    fn is_answered(&self, within: Duration) -> bool {
        // None at all would mean to wait for ever.
        let within = within.max(Duration::from_millis(1));
        self.0.set_read_timeout(Some(within)).unwrap();
        self.0.recv(&mut [0; 512]).is_ok()
    }

    fn ask(&self, within: Duration) -> bool {
        self.send();
        self.is_answered(within)
    }
}

/// TCP and UDP from one machine to another, in both families.
struct Talk {
    tcp: Vec<HttpConnection>,
    udp: Vec<Datagrams>,
}

impl Talk {
    #[track_caller]
    fn begin(from: &Machine, to: &Machine) -> Self {
        let (mut tcp, mut udp) = (Vec::new(), Vec::new());
        for address in to.addresses() {
            let ask = Ask::http(address, PORT).timeout(LONG);
            tcp.push(from.ns.run(|| ask.open()).expect("a connection"));
            udp.push(Datagrams::new(from, SocketAddr::new(address, PORT)));
        }
        let mut talk = Self { tcp, udp };
        talk.goes_on();
        talk
    }

    /// The same where a policy may still have to go.
    #[track_caller]
    fn begin_at_last(from: &Machine, to: &Machine) -> Self {
        for address in to.addresses() {
            let ask = Ask::http(address, PORT).timeout(LOST);
            wait_for("an answer", LONG, || from.ns.run(|| ask.send()).ok());
        }
        Self::begin(from, to)
    }

    /// Everything is answered.
    #[track_caller]
    fn goes_on(&mut self) {
        for connection in &mut self.tcp {
            connection.set_timeout(LONG);
            connection.ask().expect("the connection lives");
        }
        for udp in &self.udp {
            wait_for("an answer over UDP", LONG, || udp.ask(LOST).then_some(()));
        }
    }
}

/// Nothing of all this is answered.
#[track_caller]
fn are_cut(talks: &mut [Talk]) {
    for talk in &mut *talks {
        for connection in &mut talk.tcp {
            connection.send().expect("the kernel takes it");
        }
        talk.udp.iter().for_each(Datagrams::send);
    }
    // All wait at the same time.
    let until = Instant::now() + SILENCE;
    let left = || until.saturating_duration_since(Instant::now());
    for talk in talks {
        for connection in &mut talk.tcp {
            connection.set_timeout(left().max(Duration::from_millis(1)));
            let error = connection.answer().expect_err("the connection is cut");
            assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        }
        for udp in &talk.udp {
            assert!(!udp.is_answered(left()), "an answer over UDP");
        }
    }
}

#[test]
fn strict_policies_cut_what_they_deny_within_a_second() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let daemon = shop.run(&["--network-policy-strict", "--metrics-bind-address=:10249"]);
    let (web, other, third) = (shop.pod(1), shop.pod(2), shop.pod(3));
    let node = &shop.lab.node().machine;
    let mut denied = [
        Talk::begin(other, web),
        Talk::begin(web, third),
        Talk::begin(web, shop.lab.client()),
    ];
    let mut allowed = [
        Talk::begin(shop.lab.client(), web),
        Talk::begin(node, web),
        Talk::begin(other, third),
    ];
    let cut = |machines: &[&Machine]| -> Duration {
        shop.isolate();
        let in_force = Instant::now();
        for machine in machines {
            wait_for("the cut", LONG, || {
                shop.tracked(web, machine).is_empty().then_some(())
            });
        }
        in_force.elapsed()
    };
    let mut took = vec![cut(&[other, third])];
    are_cut(&mut denied);
    allowed.iter_mut().for_each(Talk::goes_on);
    // Of each of the three, TCP and UDP of two families.
    wait_for("the count", LONG, || {
        let count = scrape(shop.node()).value("nftlet_policy_connections_cut_total");
        (count? >= 12.0).then_some(())
    });
    assert!(!daemon.log().contains("WARN"), "{}", daemon.log());

    // A later policy that allows less than the one before.
    shop.policy("web", &json!({"ingress": []}));
    wait_for("the cut", LONG, || {
        let tracked = shop.tracked(shop.lab.client(), web);
        tracked.is_empty().then_some(())
    });
    let [mut from_outside, mut from_node, mut others] = allowed;
    are_cut(std::slice::from_mut(&mut from_outside));
    from_node.goes_on();
    others.goes_on();

    // A machine that stalls makes it longer, and never shorter.
    while took.iter().all(|took| *took >= Duration::from_secs(1)) {
        assert!(took.len() < 5, "{took:?}");
        shop.manifests.remove("NetworkPolicy", "web");
        let _talk = Talk::begin_at_last(other, web);
        took.push(cut(&[other]));
    }
}

/// Ends clients also where a wait is in vain.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Eight clients go on asking while a policy comes that denies them; whether the server's answers
/// opened their flows again.
fn udp_comes_back() -> bool {
    let shop = Shop::open();
    let _daemon = shop.run(&["--network-policy-strict"]);
    let (web, other) = (shop.pod(1), shop.pod(2));
    let clients: Vec<Datagrams> = (0..8)
        .map(|number| {
            let address = web.addresses()[number % 2];
            Datagrams::new(other, SocketAddr::new(address, PORT))
        })
        .collect();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let _stop = Stop(&stop);
        for client in &clients {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    client.ask(SILENCE);
                }
            });
        }
        wait_for("flows", LONG, || {
            (shop.tracked(web, other).len() >= 8).then_some(())
        });
        // Only ingress is isolated: an answer may open a connection.
        shop.policy("web", &json!({"policyTypes": ["Ingress"], "ingress": []}));
        wait_for("the cut", LONG, || {
            shop.tracked(web, other).is_empty().then_some(())
        });
    });
    let answered = clients.iter().any(|client| client.ask(SILENCE));
    answered || !shop.tracked(web, other).is_empty()
}

/// A server that the machine stalls for longer than answers are waited for may still answer what
/// came before the policy, so a flow that comes back counts if it does each time.
#[test]
fn udp_under_load_does_not_come_back_the_other_way_round() {
    if !require_net_admin() {
        return;
    }
    assert!(
        (0..4).any(|_| !udp_comes_back()),
        "answers open the flows again"
    );
}

#[test]
fn without_strict_connections_end_by_themselves() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let daemon = shop.run(&["--metrics-bind-address=:10249"]);
    let (web, other) = (shop.pod(1), shop.pod(2));
    let mut before = [Talk::begin(other, web), Talk::begin(web, other)];
    shop.isolate();
    for address in web.addresses() {
        let ask = Ask::http(address, PORT).timeout(SILENCE);
        let refused = other
            .ns
            .run(|| ask.send())
            .expect_err("new ones are denied");
        assert_eq!(refused.kind(), io::ErrorKind::TimedOut, "{refused}");
    }
    before.iter_mut().for_each(Talk::goes_on);
    let cut = scrape(shop.node()).value("nftlet_policy_connections_cut_total");
    assert_eq!(cut, Some(0.0), "{}", daemon.log());
}

#[test]
fn connections_of_a_deleted_pod_do_not_reach_its_successor() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let daemon = shop.run(&[]);
    let (web, other) = (shop.pod(1), shop.pod(2));
    let new = json!({"podSelector": {"matchLabels": {"pod": "new"}}});
    shop.policy("web", &new);
    // The successor has the same network namespace, so that the servers there never end.
    let mut denied = Talk::begin(other, web);
    let mut allowed = Talk::begin(shop.lab.client(), web);
    shop.manifests.remove("Pod", "pod-1");
    put_pod(&shop.manifests, "new", &web.addresses());
    shop.wait_until_in_force("policy-ingress-shop/web");
    wait_for("the cut", LONG * 3, || {
        shop.tracked(web, other).is_empty().then_some(())
    });
    for udp in &denied.udp {
        assert!(!udp.ask(SILENCE), "an answer over UDP");
    }
    denied.tcp.clear();
    allowed.goes_on();

    // What the pod itself outlives stays, whatever the policies say later.
    let mut before = Talk::begin(shop.pod(3), other);
    shop.policy(
        "other",
        &json!({"podSelector": {"matchLabels": {"pod": "pod-2"}}}),
    );
    shop.wait_until_in_force("policy-ingress-shop/other");
    before.goes_on();
    assert!(!daemon.log().contains("WARN"), "{}", daemon.log());
}
