//! Logs packets that network policies denied, or that audited policies would deny.
//!
//! ```text
//! deny-*, audit-* ──NFLOG──> LogReader ──> follow(), on its own thread ──> log, AuditLog
//!                                            │  ^
//!                                Query::Names └──┘ pods and policies
//! ```
//!
//! The rules limit the rate. Packets beyond what the queues hold are dropped and counted.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::sync::oneshot;

use super::audited::{AuditLog, AuditedPacket};
use crate::backoff::Backoff;
use crate::model::{ObjectName, Protocol};
use crate::netlink::{Denied, Error, LogReader, Logged};
use crate::policies::{Connection, Direction};
use crate::sync::{Names, Query};

const SHORTEST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(60);
/// The shortest interval between reports of losses.
const REPORT_LOSSES_EVERY: Duration = Duration::from_secs(60);

/// A source of logged packets.
pub(crate) trait PacketSource {
    /// Waits for the next packet.
    ///
    /// # Errors
    ///
    /// When the source fails.
    fn wait(&mut self) -> Result<Logged, Error>;
}

impl PacketSource for LogReader {
    fn wait(&mut self) -> Result<Logged, Error> {
        LogReader::wait(self)
    }
}

/// Logs the packets of a reader until the main loop, which names the pods, has ended. Opens the reader
/// again when it fails. `fields` adds structured fields. Blocks the calling thread.
pub(crate) fn follow<R: PacketSource>(
    reader: R,
    mut open: impl FnMut() -> Result<R, Error>,
    ask: &mpsc::Sender<Query>,
    audits: &AuditLog,
    fields: bool,
) {
    let mut losses = Losses::default();
    let mut next = Some(reader);
    let mut backoff = Backoff::new(SHORTEST_RETRY, LONGEST_RETRY);
    while !ask.is_closed() {
        let failed = match next.take().map_or_else(&mut open, Ok) {
            Ok(reader) => log_packets(reader, &mut losses, ask, audits, fields),
            Err(error) => Failed::AtOnce(error),
        };
        match failed {
            Failed::Ended => return,
            Failed::Later(error) => {
                tracing::warn!("{error}; some packets were not logged; listening again");
                backoff.reset();
            }
            Failed::AtOnce(error) => {
                if backoff.is_reset() {
                    tracing::warn!("{error}; packets are not logged until this works");
                }
                thread::sleep(backoff.next());
            }
        }
    }
}

/// The reason why a reader stopped.
enum Failed {
    /// The main loop has ended.
    Ended,
    /// An error before the first packet.
    AtOnce(Error),
    /// An error after some packets.
    Later(Error),
}

/// Logs packets until the reader fails.
fn log_packets(
    mut reader: impl PacketSource,
    losses: &mut Losses,
    ask: &mpsc::Sender<Query>,
    audits: &AuditLog,
    fields: bool,
) -> Failed {
    let mut received = false;
    loop {
        let packet = reader.wait();
        let first = !std::mem::replace(&mut received, packet.is_ok());
        let lost = match packet {
            // Rules of other programs may log to the same group.
            Ok(Logged::Denied(packet)) => match rule_of(&packet) {
                None => 0,
                Some(rule) => match names(&packet, rule, ask) {
                    Ok(names) if !rule.audited => {
                        log(&packet, rule, &names, fields);
                        0
                    }
                    Ok(names) => {
                        if audits.add(audited(&packet, rule, &names)) {
                            log(&packet, rule, &names, fields);
                        }
                        0
                    }
                    Err(QueryError::Busy) => 1,
                    Err(QueryError::Ended) => return Failed::Ended,
                },
            },
            Ok(Logged::Lost) => 1,
            Err(error) if first => return Failed::AtOnce(error),
            Err(error) => return Failed::Later(error),
        };
        if let Some(lost) = losses.add(lost, Instant::now()) {
            tracing::warn!("at least {lost} packets were not logged: the queue was full");
        }
    }
}

/// The reason why the names in a packet are unknown.
enum QueryError {
    /// Too many queries are queued.
    Busy,
    /// The main loop has ended.
    Ended,
}

/// Queries the names for a packet.
fn names(packet: &Denied, rule: LogRule, ask: &mpsc::Sender<Query>) -> Result<Names, QueryError> {
    let (answer, answered) = oneshot::channel();
    let query = Query::Names {
        connection: Connection {
            source: packet.source,
            destination: packet.destination,
            protocol: packet.protocol,
            port: packet.destination_port,
        },
        direction: rule.direction,
        audited: rule.audited,
        answer,
    };
    ask.try_send(query).map_err(|error| match error {
        TrySendError::Full(_) => QueryError::Busy,
        TrySendError::Closed(_) => QueryError::Ended,
    })?;
    answered.blocking_recv().map_err(|_| QueryError::Ended)
}

/// The rule that logged a packet.
#[derive(Clone, Copy)]
struct LogRule {
    direction: Direction,
    /// Whether audited policies would deny the packet; else it was denied.
    audited: bool,
}

impl LogRule {
    fn word(self) -> &'static str {
        if self.audited { "audited" } else { "denied" }
    }
}

/// Returns the rule that logged a packet, by its prefix; `None` if the rule is none of nftlet's.
fn rule_of(packet: &Denied) -> Option<LogRule> {
    let prefix = packet.prefix.strip_prefix("audit-");
    let word = prefix.unwrap_or(&packet.prefix);
    let mut directions = Direction::ALL.into_iter();
    Some(LogRule {
        direction: directions.find(|direction| direction.as_str() == word)?,
        audited: prefix.is_some(),
    })
}

/// Returns what is kept of a packet that audited policies would deny.
fn audited(packet: &Denied, rule: LogRule, names: &Names) -> AuditedPacket {
    let end = |pod: &Option<ObjectName>, address: IpAddr| {
        let pod = pod.as_ref();
        pod.map_or_else(|| address.to_string(), ToString::to_string)
    };
    AuditedPacket {
        policies: names.policies.clone(),
        direction: rule.direction,
        from: end(&names.source, packet.source),
        to: end(&names.destination, packet.destination),
        port: packet.destination_port,
        protocol: protocol(packet.protocol),
    }
}

/// Counts lost packets.
#[derive(Debug, Default)]
struct Losses {
    unreported: u64,
    reported: Option<Instant>,
}

impl Losses {
    /// Adds losses. Returns the number to report if a report is due.
    fn add(&mut self, lost: u64, now: Instant) -> Option<u64> {
        self.unreported = self.unreported.saturating_add(lost);
        let due = self
            .reported
            .is_none_or(|at| now.saturating_duration_since(at) >= REPORT_LOSSES_EVERY);
        if self.unreported == 0 || !due {
            return None;
        }
        self.reported = Some(now);
        Some(std::mem::take(&mut self.unreported))
    }
}

/// An end of a denied packet.
struct PacketEnd<'a> {
    address: IpAddr,
    port: Option<u16>,
    pod: Option<&'a ObjectName>,
}

impl PacketEnd<'_> {
    fn address_and_port(&self) -> String {
        match self.port {
            Some(port) => SocketAddr::new(self.address, port).to_string(),
            None => self.address.to_string(),
        }
    }
}

impl fmt::Display for PacketEnd<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pod {
            Some(pod) => write!(f, "{pod} ({})", self.address_and_port()),
            None => f.write_str(&self.address_and_port()),
        }
    }
}

/// Returns the name of an IP protocol as in policies, or its number.
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

/// Returns the log line for a packet.
fn line(
    packet: &Denied,
    rule: LogRule,
    source: &PacketEnd<'_>,
    destination: &PacketEnd<'_>,
    policies: &str,
) -> String {
    let (direction, protocol) = (rule.direction.as_str(), protocol(packet.protocol));
    let by = match (policies.is_empty(), rule.audited) {
        (true, _) => "",
        (false, false) => ", by ",
        (false, true) => ", would be denied by ",
    };
    let word = rule.word();
    format!("{word} {direction} {protocol} {source} -> {destination}{by}{policies}")
}

fn log(packet: &Denied, rule: LogRule, names: &Names, fields: bool) {
    let source = PacketEnd {
        address: packet.source,
        port: packet.source_port,
        pod: names.source.as_ref(),
    };
    let destination = PacketEnd {
        address: packet.destination,
        port: packet.destination_port,
        pod: names.destination.as_ref(),
    };
    let policies: Vec<&str> = names.policies.iter().map(ObjectName::as_str).collect();
    let policies = policies.join(", ");
    let line = line(packet, rule, &source, &destination, &policies);
    if fields {
        tracing::info!(
            verdict = rule.word(),
            direction = rule.direction.as_str(),
            protocol = protocol(packet.protocol),
            source = %source.address,
            source_pod = source.pod.map(ObjectName::as_str),
            source_port = source.port,
            destination = %destination.address,
            destination_pod = destination.pod.map(ObjectName::as_str),
            destination_port = destination.port,
            policies,
            "{line}"
        );
    } else {
        tracing::info!("{line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DENIED: LogRule = LogRule {
        direction: Direction::Ingress,
        audited: false,
    };

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

    fn line_of(packet: &Denied, source: Option<&ObjectName>) -> String {
        let web = ObjectName::new("shop", "web-0");
        let source = PacketEnd {
            address: packet.source,
            port: packet.source_port,
            pod: source,
        };
        let destination = PacketEnd {
            address: packet.destination,
            port: packet.destination_port,
            pod: Some(&web),
        };
        line(packet, DENIED, &source, &destination, "")
    }

    #[test]
    fn a_line_ends_with_the_policies_that_deny() {
        let tcp = packet(6, Some((41234, 8080)));
        let end = |address, port| PacketEnd {
            address,
            port,
            pod: None,
        };
        let source = end(tcp.source, tcp.source_port);
        let destination = end(tcp.destination, tcp.destination_port);
        assert_eq!(
            line(&tcp, DENIED, &source, &destination, "shop/deny, shop/web"),
            "denied ingress TCP 10.1.1.6:41234 -> 10.1.0.5:8080, by shop/deny, shop/web"
        );
    }

    #[test]
    fn a_line_names_pods_where_they_are_known() {
        let client = ObjectName::new("shop", "client");
        let tcp = packet(6, Some((41234, 8080)));
        assert_eq!(
            line_of(&tcp, Some(&client)),
            "denied ingress TCP shop/client (10.1.1.6:41234) -> shop/web-0 (10.1.0.5:8080)"
        );
        assert_eq!(
            line_of(&tcp, None),
            "denied ingress TCP 10.1.1.6:41234 -> shop/web-0 (10.1.0.5:8080)"
        );
    }

    #[test]
    fn packets_without_ports_have_addresses_alone() {
        assert_eq!(
            line_of(&packet(1, None), None),
            "denied ingress ICMP 10.1.1.6 -> shop/web-0 (10.1.0.5)"
        );
        let mut v6 = packet(47, None);
        v6.source = "fd00::1".parse().unwrap();
        assert_eq!(
            line_of(&v6, None),
            "denied ingress protocol 47 fd00::1 -> shop/web-0 (10.1.0.5)"
        );
        let mut udp = packet(17, Some((53, 5353)));
        udp.source = "fd00::1".parse().unwrap();
        assert_eq!(
            line_of(&udp, None),
            "denied ingress UDP [fd00::1]:53 -> shop/web-0 (10.1.0.5:5353)"
        );
    }

    #[test]
    fn losses_are_reported_once_a_minute() {
        let mut losses = Losses::default();
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        assert_eq!(losses.add(0, at(0)), None);
        assert_eq!(losses.add(1, at(1)), Some(1));
        assert_eq!(losses.add(1, at(2)), None);
        assert_eq!(losses.add(3, at(60)), None);
        assert_eq!(losses.add(0, at(61)), Some(4), "the rest is reported later");
        assert_eq!(losses.add(0, at(200)), None);
        assert_eq!(losses.add(1, at(201)), Some(1));
    }

    /// A reader that receives one packet and then fails.
    struct Short(Option<Denied>);

    impl PacketSource for Short {
        fn wait(&mut self) -> Result<Logged, Error> {
            let packet = self.0.take().map(Logged::Denied);
            packet.ok_or_else(|| Error::LogGroup {
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
        follow(Short(None), open, &ask, &AuditLog::default(), false);
        assert!(started.elapsed() >= SHORTEST_RETRY);
    }

    #[test]
    fn a_reader_that_fails_is_opened_again() {
        let (ask, mut queries) = mpsc::channel(8);
        let answering = thread::spawn(move || {
            for _ in 0..3 {
                let query = queries.blocking_recv();
                let Some(Query::Names {
                    connection, answer, ..
                }) = query
                else {
                    panic!("no query");
                };
                assert_eq!(connection.destination, packet(6, None).destination);
                answer.send(Names::default()).unwrap();
            }
        });
        let reader = || Short(Some(packet(6, None)));
        let mut opened = 0;
        let open = || {
            opened += 1;
            Ok(reader())
        };
        follow(reader(), open, &ask, &AuditLog::default(), false);
        answering.join().unwrap();
        assert!(opened >= 2, "{opened}");
    }
}
