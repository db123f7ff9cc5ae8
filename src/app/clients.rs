//! Clients with session affinity that could not be remembered: counted by the rules, told here.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::Error;
use super::drops::Total;
use crate::compile::{Clients, MOST_CLIENTS, table_id};
use crate::metrics::{Metrics, NotRemembered};
use crate::model::{Family, Kind, Notice, ObjectName, ObjectRef, Reason, Subject};
use crate::netlink::{self, Nftables};
use crate::reconcile::{LogAndSend, Reporter, Sticky};
use crate::ruleset::Key;

/// How often the counters are looked at where nobody asks for the metrics.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(60);
/// After so long without another one, clients that are not remembered are news again.
const QUIET: Duration = Duration::from_secs(600);

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
}

#[derive(Default)]
struct OfNamespace {
    total: Total<(Family, Key)>,
    /// The sum at the last look.
    seen: u64,
    /// When clients were last not remembered.
    last: Option<Instant>,
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

    /// Reads the counters, and tells what is new; `None` where they cannot be read.
    pub(super) fn look(&self) -> Option<Vec<NotRemembered>> {
        // A panic of an earlier look leaves nothing half done but the socket.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // The list is cloned: holding on to it would make the reconciler wait.
        let sticky = Sticky::clone(&self.sticky.borrow());
        let news = state.read(&sticky).inspect_err(|error| {
            tracing::debug!("{error}; clients not remembered are not counted this time");
        });
        for clients in news.ok()? {
            self.tell(&clients);
        }
        let totals = state.totals.iter();
        let samples = totals.map(|(clients, of_namespace)| NotRemembered {
            namespace: clients.namespace().to_owned(),
            packets: of_namespace.seen,
        });
        Some(samples.collect())
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
    /// more.
    fn read(&mut self, sticky: &Sticky) -> Result<Vec<Clients>, netlink::Error> {
        self.totals.retain(|clients, _| sticky.contains(clients));
        let mut news = Vec::new();
        if sticky.is_empty() {
            return Ok(news);
        }
        let mut nftables = match self.socket.take() {
            Some(nftables) => nftables,
            None => Nftables::open()?,
        };
        let now = Instant::now();
        for clients in sticky.iter() {
            let mut counters = HashMap::new();
            for family in Family::ALL {
                let id = table_id(family);
                let found = nftables.counters(&id, clients.forgotten().as_str())?;
                let found = found.into_iter();
                counters.extend(found.map(|(key, packets, _)| ((family, key), packets)));
            }
            let of_namespace = self.totals.entry(clients.clone()).or_default();
            if of_namespace.take(counters, now) {
                news.push(clients.clone());
            }
        }
        self.socket = Some(nftables);
        Ok(news)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_news_once_while_it_goes_on() {
        let key = Key::build().protocol(17).finish();
        let counted = |packets| HashMap::from([((Family::V4, key.clone()), packets)]);
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
