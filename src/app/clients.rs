//! Clients with session affinity that could not be remembered: counted by the rules, told here.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::Error;
use super::drops::Total;
use crate::model::{Family, Kind, Notice, ObjectName, ObjectRef, Reason, Subject};
use crate::netlink::{self, Nftables};
use crate::nft::Key;
use crate::serve::metrics::{Metrics, NotRemembered};
use crate::services::{Clients, MOST_CLIENTS, Sticky, table_id};
use crate::sync::{LogAndSend, Reporter};

/// How often the counters are looked at where nobody asks for the metrics.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(60);
/// After so long without another one, clients that are not remembered are news again.
const QUIET: Duration = Duration::from_secs(600);

/// The most namespaces that are counted apart from each other.
const MOST_NAMESPACES: usize = 100;
/// Where the others are counted; no namespace has such a name.
const OTHERS: &str = "(others)";

/// Looks at the counters, and tells of each namespace once while they go on.
pub(super) struct Watch {
    sticky: watch::Receiver<Sticky>,
    metrics: Weak<Metrics>,
    reporter: LogAndSend,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Kept from one look to the next.
    socket: Option<Nftables>,
    totals: HashMap<Clients, OfNamespace>,
    /// The packets of namespaces beyond those that are counted apart, also of ones that are gone.
    others: u64,
}

#[derive(Default)]
struct OfNamespace {
    total: Total<(Family, Key)>,
    /// The sum at the last look.
    seen: u64,
    /// When clients were last not remembered.
    last: Option<Instant>,
    /// Whether it is counted apart from others; unknown while there is nothing to count.
    apart: Option<bool>,
}

impl OfNamespace {
    /// Takes over a reading. Returns whether it is news.
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

impl Watch {
    /// Has the metrics look at each scrape.
    pub(super) fn start(
        sticky: watch::Receiver<Sticky>,
        metrics: &Arc<Metrics>,
        reporter: LogAndSend,
    ) -> Result<Arc<Self>, Error> {
        let watch = Arc::new(Self {
            sticky,
            metrics: Arc::downgrade(metrics),
            reporter,
            state: Mutex::default(),
        });
        let looks = watch.clone();
        metrics.clients_not_remembered(move || looks.look())?;
        Ok(watch)
    }

    /// Reads the counters, and tells what is new; `None` where not all could be read.
    pub(super) fn look(&self) -> Option<Vec<NotRemembered>> {
        // A panic of an earlier look leaves nothing half done but the socket.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // The list is cloned: holding on to it would make the controller wait.
        let sticky = Sticky::clone(&self.sticky.borrow());
        let (news, read) = state.read(&sticky);
        for clients in news {
            self.tell(&clients);
        }
        let read = read.inspect_err(|error| {
            tracing::debug!("{error}; clients not remembered are not counted this time");
        });
        read.ok().map(|()| state.samples())
    }

    fn tell(&self, clients: &Clients) {
        if let Some(metrics) = self.metrics.upgrade() {
            metrics.notice(Reason::AffinityFull.as_str());
        }
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

impl State {
    /// Reads the counters of namespaces. Returns those in which clients are not remembered any
    /// more, as far as it came.
    fn read(&mut self, sticky: &Sticky) -> (Vec<Clients>, Result<(), netlink::Error>) {
        if sticky.is_empty() {
            self.totals.clear();
            return (Vec::new(), Ok(()));
        }
        let mut nftables = match self.socket.take().map_or_else(Nftables::open, Ok) {
            Ok(nftables) => nftables,
            Err(error) => return (Vec::new(), Err(error)),
        };
        let (news, read) = self.take(sticky, Instant::now(), |clients| {
            read_counters(&mut nftables, clients)
        });
        if read.is_ok() {
            self.socket = Some(nftables);
        }
        (news, read)
    }

    /// Takes over the counters of each namespace, up to the first that cannot be read.
    fn take<E>(
        &mut self,
        sticky: &Sticky,
        now: Instant,
        mut read: impl FnMut(&Clients) -> Result<HashMap<(Family, Key), u64>, E>,
    ) -> (Vec<Clients>, Result<(), E>) {
        self.totals.retain(|clients, _| sticky.contains(clients));
        let apart = |of_namespace: &&OfNamespace| of_namespace.apart == Some(true);
        let mut free = MOST_NAMESPACES.saturating_sub(self.totals.values().filter(apart).count());
        let mut news = Vec::new();
        for clients in sticky.iter() {
            let counters = match read(clients) {
                Ok(counters) => counters,
                Err(error) => return (news, Err(error)),
            };
            let of_namespace = self.totals.entry(clients.clone()).or_default();
            let before = of_namespace.seen;
            if of_namespace.take(counters, now) {
                news.push(clients.clone());
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
        (news, Ok(()))
    }

    /// The namespaces with something to count, and the sum of those beyond the most.
    fn samples(&self) -> Vec<NotRemembered> {
        let apart = self.totals.iter().filter(|(_, of)| of.apart == Some(true));
        let apart = apart.map(|(clients, of)| (clients.namespace(), of.seen));
        let others = (self.others > 0).then_some((OTHERS, self.others));
        let sample = |(namespace, packets): (&str, u64)| NotRemembered {
            namespace: namespace.to_owned(),
            packets,
        };
        apart.chain(others).map(sample).collect()
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
    fn news_come_before_the_error_of_a_later_namespace() {
        let sticky: Sticky = Arc::new(["a", "b"].map(Clients::of).into());
        let (mut state, now) = (State::default(), Instant::now());
        let (news, read) = state.take(&sticky, now, |clients| match clients.namespace() {
            "a" => Ok(counted(5)),
            _ => Err("unreadable"),
        });
        assert_eq!(news, [Clients::of("a")]);
        assert_eq!(read, Err("unreadable"));
        let (news, read) = state.take(&sticky, now, |_| Ok::<_, ()>(counted(5)));
        assert_eq!((news, read), (vec![Clients::of("b")], Ok(())));
    }

    #[test]
    fn the_namespaces_counted_apart_are_bounded() {
        let names: Vec<String> = (0..150).map(|n| format!("n{n:03}")).collect();
        let all: Sticky = Arc::new(names.iter().map(|name| Clients::of(name)).collect());
        let mut state = State::default();
        let mut look = |sticky: &Sticky, packets: u64| {
            let read = |clients: &Clients| {
                let quiet = clients.namespace() == "n000";
                Ok::<_, ()>(counted(if quiet { 0 } else { packets }))
            };
            state.take(sticky, Instant::now(), read).1.unwrap();
            let mut samples = state.samples();
            samples.sort_by(|a, b| a.namespace.cmp(&b.namespace));
            samples
        };
        assert_eq!(look(&all, 0), []);
        let samples = look(&all, 2);
        assert_eq!(samples.len(), MOST_NAMESPACES + 1);
        let first = |samples: &[NotRemembered]| (samples[0].namespace.clone(), samples[0].packets);
        assert_eq!(first(&samples), (OTHERS.to_owned(), 49 * 2));
        assert_eq!(samples[1].namespace, "n001");
        // What is gone is taken off no sum, and gives its place to what is counted first then.
        let fewer: Sticky = Arc::new(all.iter().skip(2).take(140).cloned().collect());
        let samples = look(&fewer, 3);
        assert_eq!(first(&samples), (OTHERS.to_owned(), 49 * 2 + 41));
        assert_eq!(samples.len(), MOST_NAMESPACES);
    }

    #[test]
    fn a_namespace_is_news_once_while_it_goes_on() {
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
