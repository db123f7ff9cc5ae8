//! Packets that rules log are read over NFLOG.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use nftlet::netlink::{Denied, Error, LogReader, Logged, Nftables};
use nftlet::nft::{
    BaseChain, Chain, ChainKind, Comparison, Hook, Operand, Rule, Ruleset, Selector, Statement,
    Table, TableFamily, TableId, Verdict, diff,
};
use nftlet_lab::netns::{Namespace, require_net_admin, wait_for};

const GROUP: u16 = 7;
const LONG: Duration = nftlet_lab::netns::PATIENCE;
const TCP: u8 = 6;
const UDP: u8 = 17;
/// What is sent there ends a test: no other rule logs it.
const LAST_PORT: u16 = 9999;
const LOOPBACK: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::LOCALHOST),
    IpAddr::V6(Ipv6Addr::LOCALHOST),
];

fn is(selector: Selector, operand: Operand) -> Statement {
    Statement::Match(selector, Comparison::Is, operand)
}

/// A namespace in which what is sent to some ports is logged with a prefix and dropped.
fn logging(name: &str, rules: &[Vec<Statement>]) -> Namespace {
    let ns = Namespace::new(name);
    ns.ip("link set lo up");
    let last = vec![
        is(Selector::L4Protocol, Operand::Protocol(UDP)),
        is(Selector::DestinationPort, Operand::Port(LAST_PORT)),
        Statement::log("last", GROUP, 128),
    ];
    let chain = Chain {
        base: Some(BaseChain {
            kind: ChainKind::Filter,
            hook: Hook::Output,
            priority: 0,
        }),
        rules: rules.iter().cloned().chain([last]).map(Rule::new).collect(),
    };
    let table = Table {
        chains: [("output".into(), chain)].into(),
        ..Table::default()
    };
    let tables = [TableFamily::Ip, TableFamily::Ip6].map(|family| {
        let id = TableId::new(family, "nftlet-test");
        (id, table.clone())
    });
    let wanted = Ruleset {
        tables: tables.into(),
    };
    let transaction = diff(&Ruleset::default(), wanted);
    ns.run(|| Nftables::open().unwrap().apply(&transaction).unwrap());
    ns
}

/// Reads what is logged in a thread of its own, so that a test never waits for ever.
fn follow(ns: &Namespace) -> Receiver<Logged> {
    in_a_thread(ns.run(|| LogReader::open(GROUP)).unwrap())
}

fn in_a_thread(mut reader: LogReader) -> Receiver<Logged> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        while let Ok(logged) = reader.wait() {
            if sender.send(logged).is_err() {
                return;
            }
        }
    });
    receiver
}

/// The packets logged before the last one.
fn until_last(receiver: &Receiver<Logged>) -> Vec<Denied> {
    let mut found = Vec::new();
    loop {
        match receiver.recv_timeout(LONG).expect("a logged packet") {
            Logged::Denied(denied) if denied.prefix == "last" => return found,
            Logged::Denied(denied) => found.push(denied),
            Logged::Lost => panic!("packets were lost"),
        }
    }
}

/// Sends a datagram and returns the port it came from.
fn send(ns: &Namespace, to: IpAddr, port: u16) -> u16 {
    ns.run(|| {
        let socket = UdpSocket::bind(SocketAddr::new(to, 0)).unwrap();
        socket.send_to(&[0; 300], (to, port)).unwrap();
        socket.local_addr().unwrap().port()
    })
}

#[test]
fn logged_packets_are_read_with_addresses_and_ports() {
    if !require_net_admin() {
        return;
    }
    let log = |text: &str| Statement::log(text, GROUP, 64);
    let port = is(Selector::DestinationPort, Operand::Ports(5000, 5001));
    let ns = logging(
        "nflog",
        &[
            vec![
                is(Selector::L4Protocol, Operand::Protocol(UDP)),
                port.clone(),
                log("egress shop/web-0: "),
            ],
            vec![
                is(Selector::L4Protocol, Operand::Protocol(TCP)),
                port,
                log("opening"),
                Statement::Verdict(Verdict::Drop),
            ],
        ],
    );
    let receiver = follow(&ns);
    for address in LOOPBACK {
        let source_port = send(&ns, address, 5001);
        let socket = SocketAddr::new(address, 5000);
        let refused = ns.run(|| TcpStream::connect_timeout(&socket, Duration::from_millis(1)));
        refused.unwrap_err();
        send(&ns, address, 4999);
        send(&ns, address, LAST_PORT);
        let found = until_last(&receiver);
        let datagram = Denied {
            prefix: "egress shop/web-0: ".into(),
            source: address,
            destination: address,
            protocol: UDP,
            source_port: Some(source_port),
            destination_port: Some(5001),
            input: None,
            output: Some(1),
        };
        // A connection request that is not answered is repeated where the machine stalls.
        let Some((first, openings)) = found.split_first() else {
            panic!("{found:?}")
        };
        assert!(!openings.is_empty(), "{found:?}");
        assert_eq!(first, &datagram);
        assert_eq!(first.source.is_ipv4(), address.is_ipv4());
        for opening in openings {
            assert_eq!(
                (opening.prefix.as_str(), opening.protocol),
                ("opening", TCP)
            );
            assert_eq!(opening.destination_port, Some(5000));
        }
    }
}

#[test]
fn a_limit_lets_a_burst_through() {
    if !require_net_admin() {
        return;
    }
    let limit = Statement::Limit {
        per_second: 1,
        burst: 3,
    };
    let ns = logging(
        "nflog-limit",
        &[vec![
            is(Selector::L4Protocol, Operand::Protocol(UDP)),
            is(Selector::DestinationPort, Operand::Port(5000)),
            limit,
            Statement::log("limited", GROUP, 128),
        ]],
    );
    let receiver = follow(&ns);
    for _ in 0..100 {
        send(&ns, LOOPBACK[0], 5000);
    }
    send(&ns, LOOPBACK[0], LAST_PORT);
    let found = until_last(&receiver).len();
    assert!((3..50).contains(&found), "{found} packets");
}

#[test]
fn a_group_has_one_listener() {
    if !require_net_admin() {
        return;
    }
    let ns = Namespace::new("nflog-taken");
    let first = ns.run(|| LogReader::open(GROUP)).unwrap();
    let Err(error) = ns.run(|| LogReader::open(GROUP)) else {
        panic!("two listeners to one group");
    };
    assert!(matches!(error, Error::LogGroup { group: GROUP, .. }));
    assert_eq!(
        error.to_string(),
        "cannot listen to NFLOG group 7: Operation not permitted (os error 1); another process \
         (ulogd, or a second nftlet) has bound this group: choose another one; or nftlet lacks the \
         capability CAP_NET_ADMIN"
    );
    // Other groups are free, and so is this one once its listener has ended.
    ns.run(|| LogReader::open(GROUP + 1)).unwrap();
    drop(first);
    // A program that another test is about to start holds a copy of the socket until it runs.
    wait_for("the group to be free", LONG, || {
        ns.run(|| LogReader::open(GROUP)).ok()
    });
}

#[test]
fn lost_packets_are_reported_and_later_ones_are_read() {
    if !require_net_admin() {
        return;
    }
    let ns = logging(
        "nflog-lost",
        &[vec![
            is(Selector::L4Protocol, Operand::Protocol(UDP)),
            is(Selector::DestinationPort, Operand::Port(5000)),
            Statement::log("flood", GROUP, 128),
        ]],
    );
    // Nothing reads while more arrives than the queue of a socket holds.
    let reader = ns.run(|| LogReader::open(GROUP)).unwrap();
    ns.run(|| {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let receiver = UdpSocket::bind("127.0.0.1:5000").unwrap();
        for _ in 0..20_000 {
            socket
                .send_to(&[0; 300], receiver.local_addr().unwrap())
                .unwrap();
        }
    });
    let receiver = in_a_thread(reader);
    let mut read = 0;
    while let Logged::Denied(denied) = receiver.recv_timeout(LONG).expect("news of the loss") {
        assert_eq!(denied.prefix, "flood");
        read += 1;
    }
    assert!(read < 20_000, "{read} packets, and yet some are lost");
    // The kernel queues nothing more before all that is queued was read.
    wait_for("a packet after the loss", LONG, || {
        send(&ns, LOOPBACK[0], LAST_PORT);
        let mut heard = receiver.try_iter();
        heard.find(|logged| matches!(logged, Logged::Denied(denied) if denied.prefix == "last"))
    });
}
