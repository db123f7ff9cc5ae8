//! Who reaches whom: many requests at once, with the verdict that each is expected to get, and
//! with proof that what did not arrive was denied.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::Duration;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use nftlet_lab::netns::{Answer, Ask, Machine, Namespace, PATIENCE, Protocol, wait_for};

/// How long a request waits that is expected to be dropped. One that is answered all the same
/// is answered in far less, so this is no race: the denial is proved by the counters.
const DROPPED: Duration = Duration::from_millis(150);

/// How long one waits whose answer may come to nothing, so that all are asked once more.
const ASKED_AGAIN: Duration = Duration::from_secs(5);

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// A connection to this port.
    Tcp(u16),
    /// A datagram to this port.
    Udp(u16),
    /// An echo request.
    Ping,
}

/// One request and what is to become of it.
#[derive(Clone, Debug)]
pub struct Case {
    /// Who asks.
    pub from: Machine,
    /// Whom.
    pub to: IpAddr,
    /// What is sent.
    pub probe: Probe,
    /// Whether there is to be an answer.
    pub passes: bool,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            from, to, probe, ..
        } = self;
        write!(f, "{} -> {to} {probe:?}", from.name)
    }
}

impl Case {
    /// A case of each address family.
    pub fn both(from: &Machine, to: &Machine, probe: Probe, passes: bool) -> [Self; 2] {
        to.addresses().map(|to| Self {
            from: from.clone(),
            to,
            probe,
            passes,
        })
    }

    fn send(&self, answered: Duration) -> io::Result<()> {
        let timeout = if self.passes { answered } else { DROPPED };
        let ask = |protocol, port| {
            let ask = Ask::new(protocol, SocketAddr::new(self.to, port));
            ask.timeout(timeout).send().map(|_: Answer| ())
        };
        match self.probe {
            Probe::Tcp(port) => ask(Protocol::Tcp, port),
            Probe::Udp(port) => ask(Protocol::Udp, port),
            Probe::Ping => ping(self.to, timeout),
        }
    }
}

/// Sends all requests at once, each from its place, and panics with a list of all that became of
/// them otherwise than expected. What is to be denied must not be answered in any way.
#[track_caller]
pub fn check(cases: &[Case]) {
    let wrong = wrong_within(PATIENCE, cases);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// As [`check`]; returns the list, for who asks again where it is not empty.
pub fn wrong(cases: &[Case]) -> Vec<String> {
    wrong_within(ASKED_AGAIN, cases)
}

fn wrong_within(answered: Duration, cases: &[Case]) -> Vec<String> {
    let results: Vec<io::Result<()>> = thread::scope(|scope| {
        let threads: Vec<_> = cases
            .iter()
            .map(|case| {
                scope.spawn(|| {
                    case.from.ns.enter();
                    case.send(answered)
                })
            })
            .collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined
            .map(|result| result.expect("a request does not panic"))
            .collect()
    });
    let told = cases
        .iter()
        .zip(results)
        .filter_map(|(case, result)| match result {
            Ok(()) if case.passes => None,
            Ok(()) => Some(format!("{case} is answered and should be denied")),
            Err(error) if case.passes => Some(format!("{case} should be answered: {error}")),
            Err(error) if error.kind() == ErrorKind::TimedOut => None,
            Err(error) => Some(format!("{case} should be dropped silently: {error}")),
        });
    told.collect()
}

/// As [`check`], and every denied request must show in the counters of the nodes.
#[track_caller]
pub fn check_counted(nodes: &[&Namespace], cases: &[Case]) {
    let before = denied(nodes);
    check(cases);
    let expected = cases.iter().filter(|case| !case.passes).count() as u64;
    let until = before.values().sum::<u64>() + expected;
    // A packet may still be on its way when its sender has given up.
    let what = format!("the counters to grow by {expected} from {before:?}");
    wait_for(&what, PATIENCE, || {
        (denied(nodes).values().sum::<u64>() >= until).then_some(())
    });
}

/// What the policy tables of the nodes have denied so far: packets by direction and pod.
#[track_caller]
pub fn denied(nodes: &[&Namespace]) -> BTreeMap<(String, IpAddr), u64> {
    let mut found = BTreeMap::new();
    for node in nodes {
        let listing = node.nft(&["list", "ruleset"]);
        let mut set = None;
        for line in listing.lines() {
            let line = line.trim();
            if let Some(rest) = line.strip_prefix("set ") {
                set = rest.strip_suffix(" {").map(str::to_owned);
            } else if line.starts_with("chain ") || line.starts_with("map ") {
                set = None;
            }
            let Some(direction) = set.as_deref().and_then(|it| it.strip_prefix("denied-")) else {
                continue;
            };
            let elements = line.trim_start_matches("elements = { ");
            for element in elements.split(',') {
                let mut words = element.split_whitespace();
                let address = words.next().and_then(|word| word.parse::<IpAddr>().ok());
                let packets = words.skip_while(|word| *word != "packets").nth(1);
                if let (Some(address), Some(packets)) = (address, packets) {
                    let packets: u64 = packets.parse().expect("a number of packets");
                    *found.entry((direction.to_owned(), address)).or_default() += packets;
                }
            }
        }
    }
    found
}

/// Sends an echo request and waits for the reply. The namespace must allow it: see
/// [`allow_ping`].
fn ping(to: IpAddr, timeout: Duration) -> io::Result<()> {
    let (family, protocol, request) = if to.is_ipv4() {
        (AddressFamily::INET, rustix::net::ipproto::ICMP, 8)
    } else {
        (AddressFamily::INET6, rustix::net::ipproto::ICMPV6, 128)
    };
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(family, SocketType::DGRAM, flags, Some(protocol))?;
    rustix::net::connect(&socket, &SocketAddr::new(to, 0))?;
    let limit = rustix::net::sockopt::Timeout::Recv;
    rustix::net::sockopt::set_socket_timeout(&socket, limit, Some(timeout))?;
    // Type, code, checksum and identifier (both are the kernel's to fill), sequence.
    rustix::net::send(&socket, &[request, 0, 0, 0, 0, 0, 0, 1], SendFlags::empty())?;
    let mut reply = [0; 64];
    match rustix::net::recv(&socket, &mut reply, RecvFlags::empty()) {
        Ok(_) => Ok(()),
        Err(rustix::io::Errno::AGAIN) => Err(ErrorKind::TimedOut.into()),
        Err(error) => Err(error.into()),
    }
}

/// Lets everyone in a namespace send echo requests.
pub fn allow_ping(machine: &Machine) {
    machine
        .ns
        .sysctl("net.ipv4.ping_group_range", "0 2147483647");
}
