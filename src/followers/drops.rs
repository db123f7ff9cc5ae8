//! What the rules dropped, as numbers that never fall while a pod is isolated.
//!
//! An element counts for one address. It goes with the address and begins anew with the table, and
//! what it had counted must stay in the sum for its pod.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::Hash;
use std::sync::{Arc, Mutex};

use tokio::sync::watch;

use super::register_drops;
use crate::model::{Family, ObjectName};
use crate::mutex::lock;
use crate::netlink::{Error, Nftables};
use crate::nft::Key;
use crate::policies::{self, Direction, Isolated};
use crate::serve::metrics::{Registry, Sample};

/// The counters of dropped packets, read over a socket of their own.
pub(crate) struct DropCounters {
    isolated: watch::Receiver<Isolated>,
    reader: Mutex<(Option<Nftables>, Totals)>,
}

impl DropCounters {
    /// Creates a reader of the counters of the isolated pods. Opens nothing yet.
    pub(crate) fn new(isolated: watch::Receiver<Isolated>) -> Arc<Self> {
        Arc::new(Self {
            isolated,
            reader: Mutex::default(),
        })
    }

    /// Registers the metric of dropped packets. Each scrape reads the counters.
    ///
    /// # Errors
    ///
    /// When it is registered already.
    pub(crate) fn register(self: &Arc<Self>, registry: &Registry) -> Result<(), prometheus::Error> {
        let counters = self.clone();
        register_drops(registry, move || {
            let drops = counters.read()?.into_iter();
            let sample = |((pod, direction), packets): ((ObjectName, Direction), u64)| {
                let labels = [pod.namespace(), pod.name(), direction.as_str()];
                Sample::new(labels, packets)
            };
            Some(drops.map(sample).collect())
        })
    }

    /// Returns the packets of each isolated pod and direction that were dropped since it is isolated;
    /// `None` if they cannot be read.
    pub(crate) fn read(&self) -> Option<BTreeMap<(ObjectName, Direction), u64>> {
        // A panic of an earlier scrape leaves nothing half done but the socket.
        let mut reader = lock(&self.reader);
        let (socket, totals) = &mut *reader;
        let nftables = match socket.take() {
            Some(nftables) => Ok(nftables),
            None => Nftables::open(),
        };
        // Cloned, since a borrowed list would block the main loop.
        let isolated = Isolated::clone(&self.isolated.borrow());
        let drops = nftables.and_then(|mut nftables| {
            let drops = totals.add(read(&mut nftables, &isolated)?);
            *socket = Some(nftables);
            Ok(drops)
        });
        drops
            .inspect_err(|error| tracing::debug!("{error}; drops are not counted this time"))
            .ok()
    }
}

/// What one look at the counters found.
#[derive(Debug, Default)]
struct Reading {
    /// The isolated pods.
    pods: HashSet<ObjectName>,
    /// Dropped packets of their addresses.
    counters: Vec<(ObjectName, Direction, Key, u64)>,
}

/// Reads the counters of the pods that are isolated now.
fn read(nftables: &mut Nftables, isolated: &Isolated) -> Result<Reading, Error> {
    let pods: HashMap<Key, &ObjectName> = isolated
        .iter()
        .filter_map(|(address, pod)| Some((Key::address(*address), pod.as_ref()?)))
        .collect();
    let mut reading = Reading::default();
    if pods.is_empty() {
        return Ok(reading);
    }
    reading.pods = isolated.iter().filter_map(|(_, pod)| pod.clone()).collect();
    for family in Family::ALL {
        for direction in Direction::ALL {
            let table = policies::table_id(family);
            let counters = nftables.counters(&table, direction.denied().as_str())?;
            let known = counters.into_iter().filter_map(|(key, packets, _)| {
                let pod = (*pods.get(&key)?).clone();
                Some((pod, direction, key, packets))
            });
            reading.counters.extend(known);
        }
    }
    Ok(reading)
}

/// The sums of all readings.
#[derive(Debug, Default)]
struct Totals(BTreeMap<(ObjectName, Direction), Total<Key>>);

/// The sum of counters, each of which may go or begin anew.
#[derive(Debug)]
pub(super) struct Total<K> {
    /// The sum of counters that were removed or restarted.
    past: u64,
    counters: HashMap<K, u64>,
}

impl<K> Default for Total<K> {
    fn default() -> Self {
        Self {
            past: 0,
            counters: HashMap::new(),
        }
    }
}

impl<K: Eq + Hash> Total<K> {
    pub(super) fn sum(&self) -> u64 {
        let counted = self.counters.values();
        counted.fold(self.past, |sum, packets| sum.saturating_add(*packets))
    }

    /// Takes over what the counters say now.
    pub(super) fn replace(&mut self, counters: HashMap<K, u64>) {
        let before = std::mem::replace(&mut self.counters, counters);
        for (key, packets) in before {
            let continues = self.counters.get(&key).is_some_and(|now| *now >= packets);
            if !continues {
                self.past = self.past.saturating_add(packets);
            }
        }
    }
}

impl Totals {
    /// Adds a reading and returns the sums by pod and direction, of the isolated pods alone.
    fn add(&mut self, reading: Reading) -> BTreeMap<(ObjectName, Direction), u64> {
        self.0.retain(|(pod, _), _| reading.pods.contains(pod));
        let mut counters: HashMap<(ObjectName, Direction), HashMap<Key, u64>> = HashMap::new();
        for (pod, direction, key, packets) in reading.counters {
            let of_pod = counters.entry((pod.clone(), direction)).or_default();
            of_pod.insert(key, packets);
            self.0.entry((pod, direction)).or_default();
        }
        let totals = self.0.iter_mut();
        let drops = totals.map(|((pod, direction), total)| {
            let now = counters.remove(&(pod.clone(), *direction));
            total.replace(now.unwrap_or_default());
            ((pod.clone(), *direction), total.sum())
        });
        drops.collect()
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn add(totals: &mut Totals, counters: &[(&str, u64)]) -> Vec<u64> {
        let pod = ObjectName::new("shop", "web");
        let counters = counters.iter().map(|(address, packets)| {
            let address: IpAddr = address.parse().unwrap();
            let key = Key::address(address);
            (pod.clone(), Direction::Ingress, key, *packets)
        });
        let drops = totals.add(Reading {
            pods: [pod.clone()].into(),
            counters: counters.collect(),
        });
        drops.into_values().collect()
    }

    #[test]
    fn a_sum_never_falls_while_the_pod_is_isolated() {
        let mut totals = Totals::default();
        let totals = &mut totals;
        assert_eq!(add(totals, &[("10.1.0.5", 3), ("fd00::5", 4)]), [7]);
        assert_eq!(add(totals, &[("10.1.0.5", 5), ("fd00::5", 4)]), [9]);
        assert_eq!(add(totals, &[("10.1.0.5", 6)]), [10], "an address goes");
        assert_eq!(add(totals, &[("10.1.0.5", 2)]), [12], "a new table");
        assert_eq!(add(totals, &[]), [12], "isolated the other way alone");
        assert_eq!(add(totals, &[("fd00::5", 1)]), [13]);
        assert!(totals.add(Reading::default()).is_empty());
        assert_eq!(add(totals, &[("10.1.0.5", 1)]), [1], "isolated anew");
    }
}
