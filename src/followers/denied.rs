//! Logs which packets the policies denied.
//!
//! ```text
//! deny-ingress, deny-egress ──NFLOG──> LogReader ──> follow(), on a thread of its own ──> log
//!                                                      │  ^
//!                                          Query::Pods └──┘ names of the pods
//! ```
//!
//! The rules log at most so much a second; whatever is still too much is dropped on the way, and
//! counted.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::sync::oneshot;

use crate::model::{ObjectName, Protocol};
use crate::netlink::{Denied, Error, LogReader, Logged};
use crate::policies::Direction;
use crate::sync::Query;

const SHORTEST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(60);
/// How often at most losses are told.
const TELL_LOSSES_EVERY: Duration = Duration::from_secs(60);

/// Where logged packets come from.
pub trait Source {
    /// Waits for the next packet.
    ///
    /// # Errors
    ///
    /// When none can be read any more.
    fn wait(&mut self) -> Result<Logged, Error>;
}

impl Source for LogReader {
    fn wait(&mut self) -> Result<Logged, Error> {
        LogReader::wait(self)
    }
}

/// Logs the packets of a reader until the loop ends, which names the pods. A reader that fails is
/// opened again. `fields` adds the parts of a packet as fields, for a log that machines read. Blocks
/// the calling thread.
pub fn follow<R: Source>(
    reader: R,
    mut open: impl FnMut() -> Result<R, Error>,
    ask: &mpsc::Sender<Query>,
    fields: bool,
) {
    let mut losses = Losses::default();
    let mut next = Some(reader);
    let mut pause = SHORTEST_RETRY;
    while !ask.is_closed() {
        let failed = match next.take().map_or_else(&mut open, Ok) {
            Ok(reader) => hear(reader, &mut losses, ask, fields),
            Err(error) => Failed::AtOnce(error),
        };
        match failed {
            Failed::Over => return,
            Failed::Later(error) => {
                tracing::warn!("{error}; denied packets are read anew, and some are not logged");
                pause = SHORTEST_RETRY;
            }
            Failed::AtOnce(error) => {
                if pause == SHORTEST_RETRY {
                    tracing::warn!(
                        "{error}; denied packets are not logged until they can be read again"
                    );
                }
                thread::sleep(pause);
                pause = (pause * 2).min(LONGEST_RETRY);
            }
        }
    }
}

/// How the reading of denied packets ended.
enum Failed {
    /// The reconciler is gone.
    Over,
    /// Before the first packet.
    AtOnce(Error),
    /// After some.
    Later(Error),
}

/// Hands on packets until the reader fails.
fn hear(
    mut reader: impl Source,
    losses: &mut Losses,
    ask: &mpsc::Sender<Query>,
    fields: bool,
) -> Failed {
    let mut heard = false;
    loop {
        let packet = reader.wait();
        let first = !std::mem::replace(&mut heard, packet.is_ok());
        let lost = match packet {
            // Rules of others may log to the same group.
            Ok(Logged::Denied(packet)) if !is_own(&packet) => 0,
            Ok(Logged::Denied(packet)) => match pods(&packet, ask) {
                Ok([source, destination]) => {
                    log(&packet, source.as_ref(), destination.as_ref(), fields);
                    0
                }
                Err(Unnamed::Busy) => 1,
                Err(Unnamed::Over) => return Failed::Over,
            },
            Ok(Logged::Lost) => 1,
            Err(error) if first => return Failed::AtOnce(error),
            Err(error) => return Failed::Later(error),
        };
        if let Some(lost) = losses.add(lost, Instant::now()) {
            tracing::warn!(
                "at least {lost} denied packets were not logged because there were too many at once"
            );
        }
    }
}

/// Why the pods of a packet are not known.
enum Unnamed {
    /// Too many queries wait.
    Busy,
    /// The loop has ended.
    Over,
}

/// Asks for the pods at both ends of a packet.
fn pods(packet: &Denied, ask: &mpsc::Sender<Query>) -> Result<[Option<ObjectName>; 2], Unnamed> {
    let (answer, answered) = oneshot::channel();
    let query = Query::Pods {
        addresses: [packet.source, packet.destination],
        answer,
    };
    ask.try_send(query).map_err(|error| match error {
        TrySendError::Full(_) => Unnamed::Busy,
        TrySendError::Closed(_) => Unnamed::Over,
    })?;
    answered.blocking_recv().map_err(|_| Unnamed::Over)
}

/// Whether a rule of the policies logged a packet: it says the direction.
fn is_own(packet: &Denied) -> bool {
    Direction::ALL
        .map(Direction::as_str)
        .contains(&packet.prefix.as_str())
}

/// Losses that were not told yet.
#[derive(Debug, Default)]
struct Losses {
    untold: u64,
    told: Option<Instant>,
}

impl Losses {
    /// Adds losses, and returns how many to tell now, if any.
    fn add(&mut self, lost: u64, now: Instant) -> Option<u64> {
        self.untold = self.untold.saturating_add(lost);
        let due = self
            .told
            .is_none_or(|told| now.saturating_duration_since(told) >= TELL_LOSSES_EVERY);
        if self.untold == 0 || !due {
            return None;
        }
        self.told = Some(now);
        Some(std::mem::take(&mut self.untold))
    }
}

/// One end of a denied packet.
struct End<'a> {
    address: IpAddr,
    port: Option<u16>,
    pod: Option<&'a ObjectName>,
}

impl End<'_> {
    fn place(&self) -> String {
        match self.port {
            Some(port) => SocketAddr::new(self.address, port).to_string(),
            None => self.address.to_string(),
        }
    }
}

impl fmt::Display for End<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pod {
            Some(pod) => write!(f, "{pod} ({})", self.place()),
            None => f.write_str(&self.place()),
        }
    }
}

/// The name of an IP protocol as policies write it, else its number.
fn protocol(number: u8) -> String {
    const POLICY: [(Protocol, &str); 3] = [
        (Protocol::Tcp, "TCP"),
        (Protocol::Udp, "UDP"),
        (Protocol::Sctp, "SCTP"),
    ];
    const ICMP: u8 = 1;
    const ICMPV6: u8 = 58;
    let mut known = POLICY.iter().map(|(p, name)| (p.number(), *name));
    let name = known.find(|(known, _)| *known == number);
    match (name, number) {
        (Some((_, name)), _) => name.into(),
        (None, ICMP) => "ICMP".into(),
        (None, ICMPV6) => "ICMPv6".into(),
        (None, other) => format!("protocol {other}"),
    }
}

/// The line about a denied packet.
fn line(packet: &Denied, source: &End<'_>, destination: &End<'_>) -> String {
    let (direction, protocol) = (&packet.prefix, protocol(packet.protocol));
    format!("denied {direction} {protocol} {source} -> {destination}")
}

fn log(
    packet: &Denied,
    source: Option<&ObjectName>,
    destination: Option<&ObjectName>,
    fields: bool,
) {
    let source = End {
        address: packet.source,
        port: packet.source_port,
        pod: source,
    };
    let destination = End {
        address: packet.destination,
        port: packet.destination_port,
        pod: destination,
    };
    let line = line(packet, &source, &destination);
    if fields {
        tracing::info!(
            direction = packet.prefix,
            protocol = protocol(packet.protocol),
            source = %source.address,
            source_pod = source.pod.map(ObjectName::as_str),
            source_port = source.port,
            destination = %destination.address,
            destination_pod = destination.pod.map(ObjectName::as_str),
            destination_port = destination.port,
            "{line}"
        );
    } else {
        tracing::info!("{line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(protocol: u8, ports: Option<(u16, u16)>) -> Denied {
        let (source_port, destination_port) = ports.unzip();
        Denied {
            prefix: "ingress".into(),
            source: "10.1.1.6".parse().unwrap(),
            destination: "10.1.0.5".parse().unwrap(),
            protocol,
            source_port,
            destination_port,
            input: Some(3),
            output: Some(4),
        }
    }

    fn told(packet: &Denied, source: Option<&ObjectName>) -> String {
        let web = ObjectName::new("shop", "web-0");
        let source = End {
            address: packet.source,
            port: packet.source_port,
            pod: source,
        };
        let destination = End {
            address: packet.destination,
            port: packet.destination_port,
            pod: Some(&web),
        };
        line(packet, &source, &destination)
    }

    #[test]
    fn a_line_names_pods_where_they_are_known() {
        let client = ObjectName::new("shop", "client");
        let tcp = packet(6, Some((41234, 8080)));
        assert_eq!(
            told(&tcp, Some(&client)),
            "denied ingress TCP shop/client (10.1.1.6:41234) -> shop/web-0 (10.1.0.5:8080)"
        );
        assert_eq!(
            told(&tcp, None),
            "denied ingress TCP 10.1.1.6:41234 -> shop/web-0 (10.1.0.5:8080)"
        );
    }

    #[test]
    fn packets_without_ports_have_addresses_alone() {
        assert_eq!(
            told(&packet(1, None), None),
            "denied ingress ICMP 10.1.1.6 -> shop/web-0 (10.1.0.5)"
        );
        let mut v6 = packet(47, None);
        v6.source = "fd00::1".parse().unwrap();
        assert_eq!(
            told(&v6, None),
            "denied ingress protocol 47 fd00::1 -> shop/web-0 (10.1.0.5)"
        );
        let mut udp = packet(17, Some((53, 5353)));
        udp.source = "fd00::1".parse().unwrap();
        assert_eq!(
            told(&udp, None),
            "denied ingress UDP [fd00::1]:53 -> shop/web-0 (10.1.0.5:5353)"
        );
    }

    #[test]
    fn losses_are_told_once_a_minute() {
        let mut losses = Losses::default();
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        assert_eq!(losses.add(0, at(0)), None);
        assert_eq!(losses.add(1, at(1)), Some(1));
        assert_eq!(losses.add(1, at(2)), None);
        assert_eq!(losses.add(3, at(60)), None);
        assert_eq!(losses.add(0, at(61)), Some(4), "the rest is told later");
        assert_eq!(losses.add(0, at(200)), None);
        assert_eq!(losses.add(1, at(201)), Some(1));
    }

    /// Readers that hear one packet each and then fail.
    struct Short(Option<Denied>);

    impl Source for Short {
        fn wait(&mut self) -> Result<Logged, Error> {
            let heard = self.0.take().map(Logged::Denied);
            heard.ok_or_else(|| Error::LogGroup {
                group: 1,
                source: std::io::Error::from_raw_os_error(libc::ENOBUFS),
            })
        }
    }

    #[test]
    fn a_reader_that_fails_at_once_is_not_opened_again_at_once() {
        let (ask, mut queries) = mpsc::channel(8);
        let started = Instant::now();
        let open = || {
            queries.close();
            Ok(Short(None))
        };
        follow(Short(None), open, &ask, false);
        assert!(started.elapsed() >= SHORTEST_RETRY);
    }

    #[test]
    fn a_reader_that_fails_is_opened_again() {
        let (ask, mut queries) = mpsc::channel(8);
        let answering = thread::spawn(move || {
            for _ in 0..3 {
                let Some(Query::Pods { addresses, answer }) = queries.blocking_recv() else {
                    panic!("no query");
                };
                assert_eq!(addresses[1], packet(6, None).destination);
                answer.send([None, None]).unwrap();
            }
        });
        let reader = || Short(Some(packet(6, None)));
        let mut opened = 0;
        let open = || {
            opened += 1;
            Ok(reader())
        };
        follow(reader(), open, &ask, false);
        answering.join().unwrap();
        assert!(opened >= 2, "{opened}");
    }
}
