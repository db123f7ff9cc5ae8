//! Counts and reports clients with session affinity that could not be remembered.
//!
//! The rules count the packets of such clients in an element of each namespace. The counters are
//! read at each scrape of the metrics, and by the thread that removes stale clients.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::drops::Total;
use super::register_not_remembered;
use crate::model::{Family, Kind, Notice, ObjectName, ObjectRef, Reason, Subject};
use crate::mutex::lock;
use crate::netlink::{self, Nftables};
use crate::nft::Key;
use crate::serve::metrics::{Registry, Sample};
use crate::services::{Clients, MOST_CLIENTS, Sticky, table_id};
use crate::sync::{LogAndSend, Reporter};

/// The interval between two reads of the counters without a scrape.
pub(crate) const INTERVAL: Duration = Duration::from_secs(60);
/// The time without a client that is not remembered, after which the next one is reported.
const QUIET: Duration = Duration::from_secs(600);

/// The largest number of namespaces that have a series of their own.
const MOST_NAMESPACES: usize = 100;
/// The label of all other namespaces; no namespace can have this name.
const OTHERS: &str = "(others)";

/// Reads the counters, and reports a namespace once until it has been quiet for some time.
pub(crate) struct NotRemembered {
    sticky: watch::Receiver<Sticky>,
    reporter: LogAndSend,
    counts: Mutex<Counts>,
}

#[derive(Default)]
struct Counts {
    /// Kept from one read to the next.
    socket: Option<Nftables>,
    totals: HashMap<Clients, OfNamespace>,
    /// The packets of namespaces without a series of their own, also of deleted ones.
    others: u64,
}

#[derive(Default)]
struct OfNamespace {
    total: Total<(Family, Key)>,
    /// The sum of the last read.
    seen: u64,
    /// When clients were last not remembered.
    last: Option<Instant>,
    /// Whether it has a series of its own; `None` while its sum is 0.
    apart: Option<bool>,
}

impl OfNamespace {
    /// Replaces the counters. Returns whether the namespace has to be reported.
    fn take(&mut self, counters: HashMap<(Family, Key), u64>, now: Instant) -> bool {
        self.total.replace(counters);
        let sum = self.total.sum();
        if std::mem::replace(&mut self.seen, sum) == sum {
            return false;
        }
        let before = self.last.replace(now);
        before.is_none_or(|before| now.duration_since(before) > QUIET)
    }
}

impl NotRemembered {
    /// Registers the metric, whose scrapes read the counters.
    ///
    /// # Errors
    ///
    /// When it is registered already.
    pub(crate) fn register(
        registry: &Registry,
        sticky: watch::Receiver<Sticky>,
        reporter: LogAndSend,
    ) -> Result<Arc<Self>, prometheus::Error> {
        let counted = Arc::new(Self {
            sticky,
            reporter,
            counts: Mutex::default(),
        });
        let scraped = counted.clone();
        register_not_remembered(registry, move || scraped.read())?;
        Ok(counted)
    }

    /// Reads the counters and reports namespaces; `None` where not all could be read.
    pub(crate) fn read(&self) -> Option<Vec<Sample<1>>> {
        let mut counts = lock(&self.counts);
        // Cloned, since a borrowed list would make the sender wait.
        let sticky = Sticky::clone(&self.sticky.borrow());
        let (reported, read) = counts.read(&sticky);
        for clients in reported {
            self.report(&clients);
        }
        let read = read.inspect_err(|error| {
            tracing::debug!("{error}; clients not remembered are not counted this time");
        });
        read.ok().map(|()| counts.samples())
    }

    fn report(&self, clients: &Clients) {
        let name = ObjectName::new("", clients.namespace());
        self.reporter.notice(&Notice {
            subject: Subject::Object(ObjectRef::new(Kind::Namespace, name)),
            reason: Reason::AffinityFull,
            message: format!(
                "its services with session affinity remember as many clients as they may in a \
                 namespace, {MOST_CLIENTS} of each address family; more clients get any endpoint \
                 (see which are remembered: nft list map ip nftlet {})",
                clients.map()
            ),
        });
    }
}

impl Counts {
    /// Reads the counters of all namespaces. Returns the namespaces to report, up to the first that
    /// cannot be read.
    fn read(&mut self, sticky: &Sticky) -> (Vec<Clients>, Result<(), netlink::Error>) {
        if sticky.is_empty() {
            self.totals.clear();
            return (Vec::new(), Ok(()));
        }
        let mut nftables = match self.socket.take().map_or_else(Nftables::open, Ok) {
            Ok(nftables) => nftables,
            Err(error) => return (Vec::new(), Err(error)),
        };
        let (reported, read) = self.take(sticky, Instant::now(), |clients| {
            read_counters(&mut nftables, clients)
        });
        if read.is_ok() {
            self.socket = Some(nftables);
        }
        (reported, read)
    }

    /// Replaces the counters of each namespace; see [`Counts::read`].
    fn take<E>(
        &mut self,
        sticky: &Sticky,
        now: Instant,
        mut read: impl FnMut(&Clients) -> Result<HashMap<(Family, Key), u64>, E>,
    ) -> (Vec<Clients>, Result<(), E>) {
        self.totals.retain(|clients, _| sticky.contains(clients));
        let apart = |of_namespace: &&OfNamespace| of_namespace.apart == Some(true);
        let mut free = MOST_NAMESPACES.saturating_sub(self.totals.values().filter(apart).count());
        let mut reported = Vec::new();
        for clients in sticky.iter() {
            let counters = match read(clients) {
                Ok(counters) => counters,
                Err(error) => return (reported, Err(error)),
            };
            let of_namespace = self.totals.entry(clients.clone()).or_default();
            let before = of_namespace.seen;
            if of_namespace.take(counters, now) {
                reported.push(clients.clone());
            }
            let more = of_namespace.seen.saturating_sub(before);
            if more == 0 {
                continue;
            }
            let apart = *of_namespace.apart.get_or_insert_with(|| {
                let is_free = free > 0;
                free -= usize::from(is_free);
                is_free
            });
            if !apart {
                self.others = self.others.saturating_add(more);
            }
        }
        (reported, Ok(()))
    }

    /// Returns the sums of the namespaces with a series of their own, and of all others.
    fn samples(&self) -> Vec<Sample<1>> {
        let apart = self.totals.iter().filter(|(_, of)| of.apart == Some(true));
        let apart = apart.map(|(clients, of)| (clients.namespace(), of.seen));
        let others = (self.others > 0).then_some((OTHERS, self.others));
        let all = apart.chain(others);
        all.map(|(namespace, packets)| Sample::new([namespace], packets))
            .collect()
    }
}

fn read_counters(
    nftables: &mut Nftables,
    clients: &Clients,
) -> Result<HashMap<(Family, Key), u64>, netlink::Error> {
    let mut counters = HashMap::new();
    for family in Family::ALL {
        let found = nftables.counters(&table_id(family), clients.forgotten().as_str())?;
        let found = found.into_iter();
        counters.extend(found.map(|(key, packets, _)| ((family, key), packets)));
    }
    Ok(counters)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(packets: u64) -> HashMap<(Family, Key), u64> {
        let key = Key::build().protocol(17).finish();
        HashMap::from([((Family::V4, key), packets)])
    }

    #[test]
    fn reports_come_before_the_error_of_a_later_namespace() {
        let sticky: Sticky = Arc::new(["a", "b"].map(Clients::of).into());
        let (mut state, now) = (Counts::default(), Instant::now());
        let (reported, read) = state.take(&sticky, now, |clients| match clients.namespace() {
            "a" => Ok(counted(5)),
            _ => Err("unreadable"),
        });
        assert_eq!(reported, [Clients::of("a")]);
        assert_eq!(read, Err("unreadable"));
        let (reported, read) = state.take(&sticky, now, |_| Ok::<_, ()>(counted(5)));
        assert_eq!((reported, read), (vec![Clients::of("b")], Ok(())));
    }

    #[test]
    fn the_namespaces_counted_apart_are_bounded() {
        let names: Vec<String> = (0..150).map(|n| format!("n{n:03}")).collect();
        let all: Sticky = Arc::new(names.iter().map(|name| Clients::of(name)).collect());
        let mut state = Counts::default();
        let mut sample = |sticky: &Sticky, packets: u64| {
            let read = |clients: &Clients| {
                let quiet = clients.namespace() == "n000";
                Ok::<_, ()>(counted(if quiet { 0 } else { packets }))
            };
            state.take(sticky, Instant::now(), read).1.unwrap();
            let mut samples = state.samples();
            samples.sort_by(|a, b| a.labels.cmp(&b.labels));
            samples
        };
        assert_eq!(sample(&all, 0), []);
        let samples = sample(&all, 2);
        assert_eq!(samples.len(), MOST_NAMESPACES + 1);
        let first = |samples: &[Sample<1>]| (samples[0].labels[0].clone(), samples[0].count);
        assert_eq!(first(&samples), (OTHERS.to_owned(), 49 * 2));
        assert_eq!(samples[1].labels, ["n001"]);
        // A removed namespace is subtracted from no sum; the next one takes its place.
        let fewer: Sticky = Arc::new(all.iter().skip(2).take(140).cloned().collect());
        let samples = sample(&fewer, 3);
        assert_eq!(first(&samples), (OTHERS.to_owned(), 49 * 2 + 41));
        assert_eq!(samples.len(), MOST_NAMESPACES);
    }

    #[test]
    fn a_namespace_is_reported_once_while_it_goes_on() {
        let mut namespace = OfNamespace::default();
        let start = Instant::now();
        let after = |minutes: u64| start + Duration::from_secs(60 * minutes);
        assert!(!namespace.take(counted(0), after(0)));
        assert!(namespace.take(counted(5), after(1)));
        assert!(!namespace.take(counted(9), after(2)), "it goes on");
        assert!(!namespace.take(counted(9), after(9)));
        assert!(
            !namespace.take(counted(10), after(10)),
            "not quiet for long"
        );
        assert!(!namespace.take(counted(10), after(30)), "nothing new");
        assert!(namespace.take(counted(11), after(31)));
        assert!(
            !namespace.take(counted(0), after(32)),
            "counters begin anew"
        );
        assert_eq!(namespace.seen, 11, "and the sum does not fall");
    }
}
