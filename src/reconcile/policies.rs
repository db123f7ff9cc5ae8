//! Keeps the policy tables as the objects ask for, beside the services and apart from them.
//!
//! A failure of one does not hold up the other: each has its own [`State`], its own transactions
//! and its own comparison with the kernel. Policies come first, so that a new pod is isolated
//! before a service leads to it.

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;

use super::connections::Bell;
use super::repair::{self, ForeignChange, Refusal};
use super::{Kernel, MOST_REFUSALS, Outcome, Reconciler, State};
use crate::model::{Delivery, Event, Kind, Notice, ObjectName, ObjectRef, Reason, Subject};
use crate::netlink::{self, Place};
use crate::policy::{Engine, TABLE};
use crate::ruleset::diff;

/// The isolated addresses of this node in order, with their pods as far as their objects are there.
pub type Isolated = Arc<[(IpAddr, Option<ObjectName>)]>;

/// Who wants to know when other policies are in force.
#[derive(Debug, Default)]
pub(super) struct Followers {
    pub isolated: Option<watch::Sender<Isolated>>,
    pub cutter: Option<Bell>,
}

/// The policies and how far the kernel is known to agree with them.
#[derive(Debug)]
pub(super) struct Policies {
    pub engine: Engine,
    pub state: State,
    /// Addresses with another pod than before, whose connections are to be looked at when the
    /// rules are in force.
    moved: BTreeSet<IpAddr>,
    /// Those that were handed on last. They may not have been looked at yet.
    told: BTreeSet<IpAddr>,
    /// Whether rules of complete lists were written once.
    written: bool,
    /// The last error of the kernel.
    failure: Option<String>,
    /// What others changed in the tables.
    foreign: ForeignChange,
}

impl Policies {
    pub fn new(engine: Engine) -> Self {
        Self {
            engine,
            state: State::Listing,
            moved: BTreeSet::new(),
            told: BTreeSet::new(),
            written: false,
            failure: None,
            foreign: ForeignChange::default(),
        }
    }

    /// Whether the rules of complete lists are in the kernel. While lists are read again those of the
    /// former ones are; but the first policies of a cluster wait for the first lists of pods.
    fn are_in_force(&self) -> bool {
        match self.state {
            State::Unknown => false,
            State::Listing | State::Synced => self.written && !self.engine.has_first_policies(),
        }
    }
}

impl<K: Kernel> Reconciler<'_, K> {
    /// The policies as they are known.
    pub fn policies(&self) -> Option<&Engine> {
        self.policies.as_ref().map(|policies| &policies.engine)
    }

    /// Whether the policies' kinds were listed, or nobody asked for policies.
    pub fn policies_ready(&self) -> bool {
        let policies = self.policies.as_ref();
        policies.is_none_or(|policies| policies.engine.is_ready())
    }

    /// Whether policies are in force, or what keeps them from it; `None` where there is nothing to
    /// enforce.
    pub fn policies_in_force(&self) -> Option<Result<(), String>> {
        let policies = self.policies.as_ref().filter(|it| it.engine.is_on())?;
        if policies.are_in_force() {
            return Some(Ok(()));
        }
        let failure = policies.failure.as_ref();
        if let Some(failure) = failure.filter(|_| policies.state == State::Unknown) {
            return Some(Err(failure.clone()));
        }
        let missing = policies.engine.missing();
        let kinds: Vec<&str> = missing.iter().map(|kind| kind.as_str()).collect();
        let mut why = format!("waiting for the complete list of {}", kinds.join(", "));
        let stats = self.source_stats.iter();
        let faults =
            stats.flat_map(|stats| missing.iter().filter_map(|kind| stats.fault_of(*kind)));
        // One fault can be that of several kinds.
        for fault in faults.collect::<BTreeSet<String>>() {
            why.push_str("; ");
            why.push_str(&fault);
        }
        Some(Err(why))
    }

    /// Reports that policies are not in force, and why.
    pub(super) fn report_not_in_force(&self) {
        if let Some(Err(why)) = self.policies_in_force() {
            self.report(Notice {
                subject: Subject::Other("network policies".into()),
                reason: Reason::PoliciesNotInForce,
                message: format!("they are not in force on this node: {why}"),
            });
        }
    }

    /// When something is to be written without an event: an address is to be isolated no more.
    pub(super) fn policies_due(&self) -> Option<Instant> {
        let policies = self.policies.as_ref()?;
        // Otherwise the next attempt does it.
        let idle = policies.state == State::Synced && policies.engine.is_ready();
        policies.engine.departed_due().filter(|_| idle)
    }

    /// The kinds that were not listed yet, for the person who waits.
    pub fn missing(&self) -> Vec<Kind> {
        let policies = self.policies.as_ref();
        let missing = policies.map_or_else(Vec::new, |policies| policies.engine.missing());
        [self.store().missing(), missing].concat()
    }

    /// Takes over an event if it is about policies; gives it back otherwise.
    pub(super) fn take_policy_event(&mut self, delivery: Delivery) -> Option<Event> {
        if !delivery.event.is_about(&Kind::POLICY) {
            return Some(delivery.event);
        }
        if let Some(policies) = &mut self.policies {
            policies.engine.apply(delivery.event);
        }
        None
    }

    /// Brings the policy tables in line with the events taken over.
    pub(super) fn handle_policies(&mut self) -> Outcome {
        let Some(policies) = &self.policies else {
            return Outcome::Synced;
        };
        if !policies.engine.is_ready() {
            // What is in force stays so until the lists are complete.
            return match policies.state {
                State::Unknown => Outcome::Waiting,
                State::Listing | State::Synced => Outcome::Synced,
            };
        }
        match policies.state {
            State::Listing | State::Unknown => self.compare_policies(false),
            State::Synced => self.update_policies(),
        }
    }

    fn update_policies(&mut self) -> Outcome {
        let started = Instant::now();
        let Some(policies) = &mut self.policies else {
            return Outcome::Synced;
        };
        let transaction = policies.engine.update();
        if transaction.is_empty() {
            self.tell_moved();
            return Outcome::Synced;
        }
        match self.write(transaction) {
            Ok(()) => {
                self.policies_synced(started, true);
                Outcome::Synced
            }
            Err(error) => {
                let is_foreign = self.is_foreign(&error);
                self.policies_failed(&error);
                if let Some(policies) = self.policies.as_mut().filter(|_| is_foreign) {
                    policies.foreign.suspect();
                }
                self.compare_policies(false)
            }
        }
    }

    /// Compares the policy tables with what the kernel holds and writes the difference. `healing`
    /// says that what differs was changed by somebody else.
    pub(super) fn compare_policies(&mut self, healing: bool) -> Outcome {
        let started = Instant::now();
        let mut refused_before = None;
        for _ in 0..=MOST_REFUSALS {
            match self.attempt_policies() {
                Ok(operations) => {
                    let policies = self.policies.as_mut();
                    let foreign = policies.map_or(0, |policies| policies.foreign.put_back());
                    self.report_healing(TABLE, foreign, started.elapsed());
                    // At the start and after a failure connections may be left that an earlier
                    // attempt, or process, did not come to look at.
                    self.policies_synced(started, !healing || operations > 0);
                    return Outcome::Synced;
                }
                Err(error) if self.close_refused(&error, &mut refused_before) => {
                    self.metrics.failure();
                }
                Err(error) => {
                    self.policies_failed(&error);
                    break;
                }
            }
        }
        if let Some(policies) = &mut self.policies {
            policies.state = State::Unknown;
        }
        Outcome::Failed
    }

    /// Closes the policies of which something was refused. False if the error cannot be laid at the
    /// door of any.
    fn close_refused(&mut self, error: &netlink::Error, before: &mut Option<Place>) -> bool {
        match repair::judge(error, before) {
            Refusal::Fault => {}
            Refusal::Doubtful => return true,
            Refusal::Passing => return false,
        }
        let Some(policies) = &mut self.policies else {
            return false;
        };
        let culprits = match error.refused() {
            Some(Place::Chain(table, chain) | Place::Rule(table, chain, _)) => {
                policies.engine.policies_of_chain(table, chain)
            }
            Some(Place::Set(table, set) | Place::Element(table, set, ..)) => {
                policies.engine.policies_of_set(table, set)
            }
            Some(Place::Table(_) | Place::Stray(..) | Place::Transaction) | None => Vec::new(),
        };
        for policy in &culprits {
            policies.engine.refuse(policy.clone());
        }
        for policy in &culprits {
            self.report(Notice {
                subject: Subject::Object(ObjectRef::new(Kind::NetworkPolicy, policy.clone())),
                reason: Reason::KernelRefused,
                message: format!("{error}; the policy allows nothing until it changes"),
            });
        }
        !culprits.is_empty()
    }

    /// Puts back what somebody else changed in the policy tables. Returns whether anything was.
    pub(super) fn heal_policies(&mut self) -> (Option<Outcome>, bool) {
        let Some(policies) = &mut self.policies else {
            return (None, false);
        };
        if policies.state == State::Synced && !policies.engine.is_ready() {
            // What is wanted is known when the lists are complete.
            policies.state = State::Listing;
        }
        if policies.state != State::Synced {
            // The next attempt compares anyway.
            return (None, false);
        }
        let healed = self.healed;
        // What waits to be written is no change of others.
        let mut outcome = self.update_policies();
        if outcome == Outcome::Synced
            && let Some(policies) = &mut self.policies
        {
            policies.foreign.suspect();
            outcome = self.compare_policies(true);
        }
        let changed = self.healed > healed || outcome == Outcome::Failed;
        (Some(outcome), changed)
    }

    fn attempt_policies(&mut self) -> Result<usize, netlink::Error> {
        self.vouch();
        let Some(policies) = &mut self.policies else {
            return Ok(0);
        };
        // The difference is taken of the whole.
        if policies.state != State::Synced {
            policies.engine.look_at_links();
        }
        policies.engine.update();
        let wanted = policies.engine.ruleset();
        let actual = self.kernel.read(&[TABLE], &wanted)?;
        let transaction = diff(&actual, wanted);
        let operations = transaction.ops.len();
        if let Some(policies) = &mut self.policies {
            policies.foreign.found(operations);
        }
        self.write(transaction)?;
        Ok(operations)
    }

    /// Books that the rules are in force. `changed` says that others may have been before.
    fn policies_synced(&mut self, started: Instant, changed: bool) {
        let Some(policies) = &mut self.policies else {
            return;
        };
        let first = std::mem::replace(&mut policies.state, State::Synced) == State::Listing;
        policies.written = true;
        policies.failure = None;
        if first {
            // Who had the addresses before is not known, and most have the pods for long.
            policies.engine.take_moved();
        }
        let strict = policies.engine.is_strict();
        let isolated = policies.engine.isolated().filter_map(|(_, pod)| pod);
        let isolated: HashSet<&ObjectName> = isolated.collect();
        self.metrics.policy_sync(started.elapsed(), isolated.len());
        if let Some(sender) = &self.followers.isolated {
            let pods = policies.engine.isolated();
            let isolated: Isolated = pods.map(|(address, pod)| (address, pod.cloned())).collect();
            sender.send_if_modified(|known| {
                let other = *known != isolated;
                *known = isolated;
                other
            });
        }
        if let Some(cutter) = &self.followers.cutter
            && strict
            && changed
        {
            cutter.ring();
        }
        self.tell_moved();
    }

    /// Has the connections looked at of the addresses that other pods have now.
    fn tell_moved(&mut self) {
        let Some(policies) = &mut self.policies else {
            return;
        };
        policies.moved.append(&mut policies.engine.take_moved());
        if policies.moved.is_empty() {
            return;
        }
        policies.told = std::mem::take(&mut policies.moved);
        if let Some(cutter) = &self.followers.cutter {
            cutter.ring_for(policies.told.iter().copied());
        }
    }

    fn policies_failed(&mut self, error: &netlink::Error) {
        self.metrics.failure();
        self.reporter.failed(error);
        if let Some(policies) = &mut self.policies {
            policies.state = State::Unknown;
            policies.failure = Some(error.to_string());
            // Nothing is judged while it is unknown what is in force.
            policies.moved.append(&mut policies.told);
        }
    }
}
