//! What audited policies would deny: exact counts from the kernel, and the pairs of pods that the log
//! shows.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;

use super::drops::Total;
use super::register_audited;
use crate::model::{Family, Kind, Notice, ObjectName, ObjectRef, Reason, Subject};
use crate::mutex::lock;
use crate::netlink::{Error, Nftables};
use crate::nft::{Key, Name};
use crate::policies::{self, Audited, Direction};
use crate::serve::metrics::{Registry, Sample};
use crate::sync::{LogAndSend, Reporter};

/// The most pairs that are kept. The one that was not seen for the longest time gives way to a new one.
const MOST_PAIRS: usize = 10_000;
/// The shortest time between two Events about a policy.
const REPORT_EVERY: Duration = Duration::from_secs(3600);

/// A packet that audited policies would deny.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AuditedPacket {
    pub policies: Vec<ObjectName>,
    pub direction: Direction,
    /// The pod that sent it, or its address.
    pub from: String,
    /// The pod that receives it, or its address.
    pub to: String,
    pub port: Option<u16>,
    pub protocol: String,
}

/// Two ends between which a policy would deny connections to a port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct AuditedPair {
    pub policy: ObjectName,
    pub direction: Direction,
    pub from: String,
    pub to: String,
    pub port: Option<u16>,
    pub protocol: String,
}

/// How often and when a pair was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sightings {
    pub connections: u64,
    pub first: SystemTime,
    pub last: SystemTime,
}

/// The pairs that the log of packets showed.
#[derive(Default)]
pub(crate) struct AuditLog {
    pairs: Mutex<BTreeMap<AuditedPair, Sightings>>,
    /// When an Event was last sent about each policy.
    reported: Mutex<HashMap<ObjectName, Instant>>,
    reporter: Option<LogAndSend>,
}

impl AuditLog {
    /// Creates a log that reports the policies that would deny something.
    pub(crate) fn new(reporter: LogAndSend) -> Self {
        Self {
            reporter: Some(reporter),
            ..Self::default()
        }
    }

    /// Adds a packet. Returns whether it shows a pair that was not known.
    pub(crate) fn add(&self, packet: AuditedPacket) -> bool {
        let now = SystemTime::now();
        let mut is_new = false;
        for policy in &packet.policies {
            let pair = AuditedPair {
                policy: policy.clone(),
                direction: packet.direction,
                from: packet.from.clone(),
                to: packet.to.clone(),
                port: packet.port,
                protocol: packet.protocol.clone(),
            };
            is_new |= add(&mut lock(&self.pairs), pair, now, MOST_PAIRS);
            self.report(policy, &packet);
        }
        is_new
    }

    fn report(&self, policy: &ObjectName, packet: &AuditedPacket) {
        let Some(reporter) = &self.reporter else {
            return;
        };
        let now = Instant::now();
        let mut reported = lock(&self.reported);
        reported.retain(|_, at| now.saturating_duration_since(*at) < REPORT_EVERY);
        if reported.contains_key(policy) {
            return;
        }
        reported.insert(policy.clone(), now);
        let AuditedPacket {
            direction,
            from,
            to,
            protocol,
            ..
        } = packet;
        let port = packet
            .port
            .map_or_else(String::new, |port| format!(":{port}"));
        let policy = ObjectRef::new(Kind::NetworkPolicy, policy.clone());
        reporter.notice(&Notice {
            message: format!(
                "{policy}: if enforced, it would deny {} {protocol} {from} -> {to}{port}; nftlet \
                 audit lists what else",
                direction.as_str()
            ),
            subject: Subject::Object(policy),
            reason: Reason::WouldDeny,
        });
    }

    /// Returns the pairs that were seen since a time.
    pub(crate) fn since(&self, time: SystemTime) -> Vec<(AuditedPair, Sightings)> {
        let pairs = lock(&self.pairs);
        let recent = pairs.iter().filter(|(_, seen)| seen.last >= time);
        recent.map(|(pair, seen)| (pair.clone(), *seen)).collect()
    }
}

/// Adds a sighting of a pair. Returns whether the pair is new.
fn add(
    pairs: &mut BTreeMap<AuditedPair, Sightings>,
    pair: AuditedPair,
    now: SystemTime,
    most: usize,
) -> bool {
    if let Some(seen) = pairs.get_mut(&pair) {
        seen.connections = seen.connections.saturating_add(1);
        seen.last = now;
        return false;
    }
    if pairs.len() >= most {
        let oldest = pairs.iter().min_by_key(|(_, seen)| seen.last);
        if let Some(oldest) = oldest.map(|(pair, _)| pair.clone()) {
            pairs.remove(&oldest);
        }
    }
    let seen = Sightings {
        connections: 1,
        first: now,
        last: now,
    };
    pairs.insert(pair, seen);
    true
}

/// A policy, and a pod for which it would deny in a direction.
pub(crate) type AuditedPod = (ObjectName, ObjectName, Direction);

/// The counters of what audited policies would deny, read over a socket of their own.
pub(crate) struct AuditCounters {
    audited: watch::Receiver<Audited>,
    reader: Mutex<(Option<Nftables>, Totals)>,
}

impl AuditCounters {
    /// Creates a reader of the counters. Opens nothing yet.
    pub(crate) fn new(audited: watch::Receiver<Audited>) -> Arc<Self> {
        Arc::new(Self {
            audited,
            reader: Mutex::default(),
        })
    }

    /// Registers the metric. Each scrape reads the counters.
    ///
    /// # Errors
    ///
    /// When it is registered already.
    pub(crate) fn register(self: &Arc<Self>, registry: &Registry) -> Result<(), prometheus::Error> {
        let counters = self.clone();
        register_audited(registry, move || {
            let counts = counters.read()?.into_iter();
            let sample = |((policy, pod, direction), packets): (AuditedPod, u64)| {
                let (namespace, policy) = (policy.namespace(), policy.name());
                let labels = [namespace, policy, pod.name(), direction.as_str()];
                Sample::new(labels, packets)
            };
            Some(counts.map(sample).collect())
        })
    }

    /// Returns the packets that each audited policy would deny for each pod and direction, since it is
    /// audited for that pod; `None` if they cannot be read.
    pub(crate) fn read(&self) -> Option<BTreeMap<AuditedPod, u64>> {
        // A panic of an earlier scrape leaves nothing half done but the socket.
        let mut reader = lock(&self.reader);
        let (socket, totals) = &mut *reader;
        // Cloned, since a borrowed list would block the main loop.
        let audited = Audited::clone(&self.audited.borrow());
        let nftables = match socket.take() {
            Some(nftables) => Ok(nftables),
            None if audited.is_empty() => return Some(totals.add(&audited, &Counters::new())),
            None => Nftables::open(),
        };
        let counts = nftables.and_then(|mut nftables| {
            let counts = totals.add(&audited, &read(&mut nftables, &audited)?);
            *socket = Some(nftables);
            Ok(counts)
        });
        counts
            .inspect_err(|error| tracing::debug!("{error}; audits are not counted this time"))
            .ok()
    }
}

/// The packets that the elements of sets counted.
type Counters = HashMap<(Name, Key), u64>;

/// Reads the counters of the audited addresses.
fn read(nftables: &mut Nftables, audited: &Audited) -> Result<Counters, Error> {
    let mut sets: Vec<(Family, &Name)> = audited
        .iter()
        .map(|it| (Family::of(it.address), &it.set))
        .collect();
    sets.sort_unstable();
    sets.dedup();
    let mut found = Counters::new();
    for (family, set) in sets {
        let table = policies::table_id(family);
        let counters = nftables.counters(&table, set.as_str())?.into_iter();
        found.extend(counters.map(|(key, packets, _)| ((set.clone(), key), packets)));
    }
    Ok(found)
}

/// The sums of all readings. A set goes with the list of policies that it counts for, and what it had
/// counted must stay in their sums.
#[derive(Debug, Default)]
struct Totals(BTreeMap<AuditedPod, Total<(Name, Key)>>);

impl Totals {
    /// Adds a reading and returns the sums, of what is audited now alone.
    fn add(&mut self, audited: &Audited, counters: &Counters) -> BTreeMap<AuditedPod, u64> {
        let mut now: BTreeMap<AuditedPod, Counters> = BTreeMap::new();
        for it in audited.iter() {
            let at = (it.set.clone(), Key::address(it.address));
            let packets = counters.get(&at).copied();
            for policy in &it.policies {
                let of = (policy.clone(), it.pod.clone(), it.direction);
                let of = now.entry(of).or_default();
                of.extend(packets.map(|packets| (at.clone(), packets)));
            }
        }
        self.0.retain(|of, _| now.contains_key(of));
        let sums = now.into_iter().map(|(of, counters)| {
            let total = self.0.entry(of.clone()).or_default();
            total.replace(counters);
            (of, total.sum())
        });
        sums.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policies::AuditedAddress;

    fn pair(to: &str) -> AuditedPair {
        AuditedPair {
            policy: ObjectName::new("shop", "deny"),
            direction: Direction::Ingress,
            from: "shop/client".to_owned(),
            to: to.to_owned(),
            port: Some(80),
            protocol: "TCP".to_owned(),
        }
    }

    #[test]
    fn the_pair_that_was_not_seen_for_the_longest_time_gives_way() {
        let mut pairs = BTreeMap::new();
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        assert!(add(&mut pairs, pair("a"), at(1), 2));
        assert!(add(&mut pairs, pair("b"), at(2), 2));
        assert!(!add(&mut pairs, pair("a"), at(3), 2));
        assert!(add(&mut pairs, pair("c"), at(4), 2));
        let kept: Vec<&str> = pairs.keys().map(|pair| &*pair.to).collect();
        assert_eq!(kept, ["a", "c"]);
        let expected = Sightings {
            connections: 2,
            first: at(1),
            last: at(3),
        };
        assert_eq!(pairs[&pair("a")], expected);
    }

    #[test]
    fn a_packet_counts_for_each_policy_that_would_deny_it() {
        let log = AuditLog::default();
        let policies = ["deny", "web"].map(|name| ObjectName::new("shop", name));
        let packet = AuditedPacket {
            policies: policies.to_vec(),
            direction: Direction::Egress,
            from: "shop/client".to_owned(),
            to: "192.0.2.1".to_owned(),
            port: None,
            protocol: "ICMP".to_owned(),
        };
        assert!(log.add(packet.clone()));
        assert!(!log.add(packet));
        let seen = log.since(SystemTime::UNIX_EPOCH);
        let named: Vec<_> = seen
            .iter()
            .map(|(pair, it)| (&pair.policy, it.connections))
            .collect();
        assert_eq!(named, [(&policies[0], 2), (&policies[1], 2)]);
        let later = SystemTime::now() + Duration::from_secs(1);
        assert!(log.since(later).is_empty());
    }

    #[test]
    fn sums_are_those_of_each_policy_and_never_fall_while_it_is_audited() {
        let [deny, web] = ["deny", "web"].map(|name| ObjectName::new("shop", name));
        let pod = ObjectName::new("shop", "web-0");
        let audited = |set: &str, policies: &[&ObjectName]| -> Audited {
            [AuditedAddress {
                address: "10.1.0.5".parse().unwrap(),
                direction: Direction::Ingress,
                pod: pod.clone(),
                set: Name::from(set),
                policies: policies.iter().map(|policy| (*policy).clone()).collect(),
            }]
            .into()
        };
        let key = Key::address("10.1.0.5".parse().unwrap());
        let counted =
            |set: &str, packets| Counters::from([((Name::from(set), key.clone()), packets)]);
        let mut totals = Totals::default();
        let mut sums = |audited: &Audited, counters: &Counters| -> Vec<u64> {
            totals.add(audited, counters).into_values().collect()
        };
        let one = audited("one", &[&deny]);
        assert_eq!(sums(&one, &counted("one", 3)), [3]);
        // Another set, which starts at 0, counts for both.
        let two = audited("two", &[&deny, &web]);
        assert_eq!(sums(&two, &counted("two", 2)), [5, 2]);
        assert_eq!(sums(&two, &counted("two", 4)), [7, 4]);
        assert_eq!(sums(&audited("three", &[&web]), &Counters::new()), [4]);
        assert!(sums(&Audited::default(), &Counters::new()).is_empty());
        assert_eq!(sums(&one, &counted("one", 1)), [1], "audited anew");
    }
}
