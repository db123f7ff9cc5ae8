//! nftlet's side: a reconciler with a real kernel behind it, and what its calls cost.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use nftlet::compile::TABLE;
use nftlet::metrics::Metrics;
use nftlet::model::{Event, Notice, Reason};
use nftlet::netlink::{Applied, Error, Monitor, Nftables, encode};
use nftlet::reconcile::{Kernel, Outcome, Reconciler, Reporter};
use nftlet::ruleset::{Element, Ruleset, TableId, Transaction};
use serde::Serialize;

use crate::workload::{deliveries, settings};

/// What one call of the reconciler cost.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Cost {
    /// From handing over the events to the kernel's answer, in seconds like all times.
    pub total: f64,
    /// Encoding the messages; 0 unless asked for.
    pub encode: f64,
    /// Encoding and sending the messages until the kernel's answer.
    pub apply: f64,
    /// Reading what the kernel holds.
    pub read: f64,
    /// Transactions written.
    pub transactions: usize,
    /// Netlink messages in them.
    pub messages: usize,
    /// Elements added and deleted.
    pub elements: usize,
    /// Their size.
    pub bytes: usize,
}

impl Cost {
    /// The time in which nftlet itself compiled and compared.
    pub fn compile(&self) -> f64 {
        self.total - self.apply - self.read
    }

    /// The time in the kernel, where encoding was measured.
    pub fn kernel(&self) -> f64 {
        self.apply - self.encode
    }
}

/// The kernel with a note of every call.
struct Metered {
    kernel: Nftables,
    cost: Rc<RefCell<Cost>>,
    /// Encode every transaction once more, to know how long that takes. The reconciler's own
    /// encoding is inside the call that sends.
    split: Rc<RefCell<bool>>,
    spent_splitting: Rc<RefCell<Duration>>,
}

impl Kernel for Metered {
    fn apply(&mut self, transaction: &Transaction) -> Result<Applied, Error> {
        if *self.split.borrow() {
            let started = Instant::now();
            let batch = encode(transaction, 1)?;
            self.cost.borrow_mut().encode += started.elapsed().as_secs_f64();
            drop(batch);
            *self.spent_splitting.borrow_mut() += started.elapsed();
        }
        let started = Instant::now();
        let applied = self.kernel.apply(transaction)?;
        let mut cost = self.cost.borrow_mut();
        cost.apply += started.elapsed().as_secs_f64();
        cost.transactions += 1;
        cost.messages += applied.messages;
        cost.elements += applied.elements;
        cost.bytes += applied.bytes;
        Ok(applied)
    }

    fn read(&mut self, names: &[&str], wanted: &Ruleset) -> Result<Ruleset, Error> {
        let started = Instant::now();
        let found = self.kernel.read(names, wanted);
        self.cost.borrow_mut().read += started.elapsed().as_secs_f64();
        found
    }

    fn elements(&mut self, table: &TableId, set: &str) -> Result<Vec<Element>, Error> {
        self.kernel.elements(table, set)
    }

    fn generation(&mut self) -> Result<u32, Error> {
        self.kernel.generation()
    }
}

/// The objects are sound and the kernel accepts them, so there is nothing to tell but what the
/// benchmark does by itself.
struct Strict;

impl Reporter for Strict {
    fn notice(&self, notice: &Notice) {
        let expected = notice.reason == Reason::ForeignChange;
        assert!(expected, "{}: {}", notice.subject, notice.message);
    }

    fn failed(&self, error: &Error) {
        panic!("{error}");
    }

    fn flows_stay(&self, error: &Error) {
        panic!("{error}");
    }
}

fn failed<T>(error: Error) -> T {
    panic!("{error}")
}

/// A reconciler that programs a namespace.
pub struct Agent<'a> {
    reconciler: Reconciler<'a, Metered>,
    cost: Rc<RefCell<Cost>>,
    split: Rc<RefCell<bool>>,
    spent_splitting: Rc<RefCell<Duration>>,
    /// As in the agent, somebody listens for changes after the first program: the kernel composes
    /// news for them.
    monitor: Option<Monitor>,
    listening: Option<Monitor>,
}

impl<'a> Agent<'a> {
    /// A new one for the namespace of the calling thread, which knows nothing of an earlier one.
    pub fn new(metrics: &'a Metrics) -> Self {
        let mut kernel = Nftables::open().unwrap_or_else(failed);
        let monitor = Monitor::new(&[TABLE], &kernel);
        kernel.write_unheard_by(monitor.absence());
        let (cost, split, spent_splitting) = Default::default();
        let metered = Metered {
            kernel,
            cost: Rc::clone(&cost),
            split: Rc::clone(&split),
            spent_splitting: Rc::clone(&spent_splitting),
        };
        Self {
            reconciler: Reconciler::new(metered, settings(), metrics, &Strict),
            monitor: Some(monitor),
            listening: None,
            cost,
            split,
            spent_splitting,
        }
    }

    /// Measures encoding apart from now on. It distorts what follows a little: use the total of
    /// calls that did not do it.
    pub fn split(&self) {
        *self.split.borrow_mut() = true;
    }

    /// Hands events over and waits until their rules are in force.
    pub fn handle(&mut self, events: Vec<Event>) -> Cost {
        let events = deliveries(events);
        self.cost.take();
        self.spent_splitting.take();
        let started = Instant::now();
        let outcome = self.reconciler.handle(events);
        let took = started.elapsed();
        assert_eq!(outcome, Outcome::Synced);
        if let Some(mut monitor) = self.monitor.take() {
            monitor.listen().unwrap_or_else(failed);
            self.listening = Some(monitor);
        }
        let total = took.saturating_sub(*self.spent_splitting.borrow());
        Cost {
            total: total.as_secs_f64(),
            ..*self.cost.borrow()
        }
    }

    /// Has somebody else change the rules. From when that is done, until the rules are as before.
    pub fn heal(&mut self, meddle: impl FnOnce()) -> Cost {
        let monitor = self.listening.as_mut().expect("rules are in force");
        self.cost.take();
        self.spent_splitting.take();
        meddle();
        let started = Instant::now();
        monitor.wait().unwrap_or_else(failed);
        let (outcomes, changed) = self.reconciler.heal();
        let took = started.elapsed();
        assert_eq!((outcomes.together(), changed), (Outcome::Synced, true));
        let total = took.saturating_sub(*self.spent_splitting.borrow());
        Cost {
            total: total.as_secs_f64(),
            ..*self.cost.borrow()
        }
    }

    /// How long the reconciler is kept from its work by an audit.
    pub fn audit(&mut self) -> Cost {
        let started = Instant::now();
        let snapshot = self.reconciler.snapshot();
        let total = started.elapsed().as_secs_f64();
        assert!(snapshot.is_some(), "rules are in force");
        Cost {
            total,
            ..Cost::default()
        }
    }
}
