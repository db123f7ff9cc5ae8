//! Packets: what is denied is answered with `--deny-with=reject`, up to a rate.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Instant;

use rustix::net::{AddressFamily, SendFlags, SocketType, ipproto, sendto, socket};

use crate::support::manifests::{Backend, CLUSTER_CIDR, Service};
use crate::support::objects::policy;
use crate::support::reach::{Case, Probe, check_counted, denied};
use crate::support::shop::Shop;
use nftlet_lab::netns::{Ask, Machine, Namespace, PATIENCE, Protocol, require_net_admin, wait_for};
use serde_json::json;

/// The burst and the rate per second of the rules.
const BURST: u64 = 100;
const RATE: u64 = 100;

/// The shop with a service and the pod web isolated in both directions.
fn closed_shop() -> Shop {
    let shop = Shop::open();
    let [web, db, _] = shop.pods();
    for (name, last, behind) in [("web", 10, &web), ("db", 11, &db)] {
        let service = Service::new(name, last).port("http", "TCP", 80, None);
        shop.manifests.service(&service);
        let backends = behind
            .addresses()
            .map(|address| Backend::new(address, "node-1"));
        shop.manifests.backends(&service, 8080, &backends);
    }
    let spec = json!({"podSelector": {"matchLabels": {"app": "web"}},
        "policyTypes": ["Ingress", "Egress"]});
    shop.manifests.put(&policy("web", spec));
    shop
}

fn program(shop: &Shop, deny_with: &str) {
    let flags = ["--cluster-cidr", CLUSTER_CIDR, "--deny-with", deny_with];
    shop.manifests.program(shop.node(), &flags);
}

/// Returns the error of a request that is answered with one.
#[track_caller]
fn refused(protocol: Protocol, from: &Machine, to: IpAddr, port: u16) -> ErrorKind {
    let ask = Ask::new(protocol, SocketAddr::new(to, port));
    let error = from.ns.run(|| ask.send()).expect_err("a policy denies it");
    error.kind()
}

/// The errors for ICMP and ICMPv6 communication administratively prohibited.
fn prohibited(to: IpAddr) -> ErrorKind {
    if to.is_ipv4() {
        ErrorKind::HostUnreachable
    } else {
        ErrorKind::PermissionDenied
    }
}

#[test]
fn what_is_denied_is_refused_at_once_or_dropped() {
    if !require_net_admin() {
        return;
    }
    let shop = closed_shop();
    let [web, db, api] = shop.pods();
    let node = &shop.lab.node().machine;
    program(&shop, "reject");
    let before = denied(&[shop.node()]);
    // To the pod, from it, and from it to the node.
    let ways = [
        (&db, &web),
        (shop.lab.client(), &web),
        (&web, &db),
        (&web, node),
    ];
    for (from, to) in ways {
        for to in to.addresses() {
            let tcp = refused(Protocol::Tcp, from, to, 80);
            assert_eq!(tcp, ErrorKind::ConnectionRefused, "{} to {to}", from.name);
            let udp = refused(Protocol::Udp, from, to, 80);
            assert_eq!(udp, prohibited(to), "{} to {to}", from.name);
        }
    }
    // The answer is translated back.
    for (from, to) in [
        (&db, ["10.96.0.10", "fd00:10:96::a"]),
        (&web, ["10.96.0.11", "fd00:10:96::b"]),
    ] {
        for to in to {
            let to = to.parse().expect("an address");
            let tcp = refused(Protocol::Tcp, from, to, 80);
            assert_eq!(tcp, ErrorKind::ConnectionRefused, "{} to {to}", from.name);
        }
    }
    let count = |counted: &std::collections::BTreeMap<_, u64>| counted.values().sum::<u64>();
    let rejected = count(&denied(&[shop.node()])) - count(&before);
    assert_eq!(rejected, 20, "each is counted once");
    let allowed = Case::both(&db, &api, Probe::Tcp(80), true);
    check_counted(&[shop.node()], &allowed);

    program(&shop, "drop");
    let cases = ways.map(|(from, to)| {
        [Probe::Tcp(80), Probe::Udp(80)].map(|probe| Case::both(from, to, probe, false))
    });
    check_counted(&[shop.node()], &cases.concat().concat());
}

/// Counts the resets and the errors that arrive in a namespace.
pub fn count_answers(ns: &Namespace) {
    ns.nft_load(
        "table inet answers {
            counter resets { }
            counter errors { }
            chain incoming {
                type filter hook input priority 0;
                tcp flags & rst == rst counter name resets
                icmp type destination-unreachable counter name errors
                icmpv6 type destination-unreachable counter name errors
            }
        }",
    );
}

pub fn answers(ns: &Namespace, counter: &str) -> u64 {
    let listing = ns.nft(&["list", "counter", "inet", "answers", counter]);
    let mut words = listing
        .split_whitespace()
        .skip_while(|word| *word != "packets");
    let packets = words.nth(1).expect("a number");
    packets.parse().expect("a number")
}

/// Returns how many packets the policies have denied to a pod.
fn denied_to(shop: &Shop, pod: IpAddr) -> u64 {
    let all = denied(&[shop.node()]);
    all.get(&("ingress".to_owned(), pod)).copied().unwrap_or(0)
}

#[test]
fn beyond_the_rate_there_is_silence() {
    const SENT: u64 = 1000;
    if !require_net_admin() {
        return;
    }
    let shop = closed_shop();
    let [web, db, _] = shop.pods();
    program(&shop, "reject");
    count_answers(&db.ns);
    for (round, to) in web.addresses().into_iter().enumerate() {
        let before = answers(&db.ns, "errors");
        let started = Instant::now();
        db.ns.run(|| {
            // Not connected, so that the errors do not keep the next ones from being sent.
            let socket = UdpSocket::bind((db.address_like(to), 0)).expect("a socket");
            for _ in 0..SENT {
                socket.send_to(b"?", (to, 80)).expect("it is sent");
            }
        });
        wait_for("all to be denied", PATIENCE, || {
            (denied_to(&shop, to) == SENT).then_some(())
        });
        let took = started.elapsed();
        let answered = answers(&db.ns, "errors") - before;
        let most = BURST + RATE * (took.as_secs() + 1);
        assert!((BURST..=most).contains(&answered), "{answered} in {took:?}");
        assert!(answered < SENT, "{answered} in {took:?} (round {round})");
        // TCP has a rate of its own.
        let tcp = refused(Protocol::Tcp, &db, to, 80);
        assert_eq!(tcp, ErrorKind::ConnectionRefused);
    }
}

/// Returns the checksum of these bytes in IP, TCP, UDP and ICMP.
pub fn checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes.chunks(2).map(|pair| {
        let low = pair.get(1).copied().unwrap_or_default();
        u32::from(u16::from_be_bytes([pair[0], low]))
    });
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// Returns a TCP segment without data from port 40000 to port 80.
fn segment(from: &Machine, to: &Machine, flags: u8) -> Vec<u8> {
    let mut segment = vec![
        0x9c, 0x40, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 4, 0, 0, 0, 0, 0,
    ];
    let mut sum = [from.v4.octets(), to.v4.octets()].concat();
    sum.extend([0, 6, 0, 20]);
    sum.extend(&segment);
    segment[16..18].copy_from_slice(&checksum(&sum));
    segment
}

/// Returns an ICMP message, an error about a datagram that was never sent.
fn icmp(from: &Machine, to: &Machine, kind: u8) -> Vec<u8> {
    let mut message = vec![kind, 1, 0, 0, 0, 0, 0, 0];
    message.extend([0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0]);
    message.extend([to.v4.octets(), from.v4.octets()].concat());
    message.extend([0, 80, 0x9c, 0x40, 0, 8, 0, 0]);
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum);
    message
}

#[test]
fn neither_resets_nor_errors_are_answered() {
    const ACK: u8 = 0x10;
    const RST: u8 = 0x04;
    const ECHO: u8 = 8;
    const UNREACHABLE: u8 = 3;
    if !require_net_admin() {
        return;
    }
    let shop = closed_shop();
    let [web, db, _] = shop.pods();
    program(&shop, "reject");
    count_answers(&db.ns);
    let send = |protocol, packet: &[u8]| {
        let before = denied_to(&shop, web.v4.into());
        db.ns.run(|| {
            let socket = socket(AddressFamily::INET, SocketType::RAW, Some(protocol));
            let to = SocketAddr::new(web.v4.into(), 0);
            sendto(
                socket.expect("a raw socket"),
                packet,
                SendFlags::empty(),
                &to,
            )
            .expect("sent");
        });
        wait_for("it to be denied", PATIENCE, || {
            (denied_to(&shop, web.v4.into()) > before).then_some(())
        });
    };
    // The other packets prove that an answer would be counted.
    send(ipproto::TCP, &segment(&db, &web, RST));
    send(ipproto::TCP, &segment(&db, &web, ACK));
    send(ipproto::ICMP, &icmp(&db, &web, UNREACHABLE));
    send(ipproto::ICMP, &icmp(&db, &web, ECHO));
    for counter in ["resets", "errors"] {
        wait_for("one answer", PATIENCE, || {
            (answers(&db.ns, counter) == 1).then_some(())
        });
    }
    // An answer to any of them would have come before this one.
    refused(Protocol::Udp, &db, web.v4.into(), 80);
    assert_eq!(
        (answers(&db.ns, "resets"), answers(&db.ns, "errors")),
        (1, 2)
    );
}
