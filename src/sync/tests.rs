//! The reconciler against a model of the kernel.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use proptest::collection::vec;
use proptest::prelude::*;

use tokio::sync::{mpsc, watch};

use super::*;
use crate::model::{
    Endpoint, EndpointSlice, Family, Node, Object, ObjectName, ObjectRef, Protocol, Service,
    ServiceCidr, ServiceKind, ServicePort, SlicePort, TrafficPolicy,
};
use crate::netlink::{Applied, Error, Refusal};
use crate::nft::{
    Element, Key, Name, ObjectPath, Op, Ruleset, SumKeys, TableId, Transaction, simulate,
};
use crate::serve::health::{Health, Moment};
use crate::services::{DetectLocal, ServiceSet, table_id};

mod foreign;
mod large;
mod parts;
mod policies;
mod portions;
mod queries;
mod turns;

/// A kernel in memory. Clones share it, so that tests can look and meddle.
#[derive(Clone, Default)]
pub(crate) struct Fake(pub(crate) Rc<RefCell<FakeState>>);

#[derive(Default)]
pub(crate) struct FakeState {
    pub(crate) ruleset: Ruleset,
    pub(crate) applied: Vec<Transaction>,
    pub(crate) reads: usize,
    /// How often what packets add to a set was read, and what timed out thereafter.
    pub(crate) reads_of_sets: usize,
    pub(crate) timed_out: Vec<Element>,
    /// Transactions to fail before the next one succeeds.
    pub(crate) failures: usize,
    /// Transactions to take before all later ones fail.
    pub(crate) most: Option<usize>,
    /// The kernel does not want elements with this key.
    pub(crate) unwanted: Option<Key>,
    /// Nor with these.
    pub(crate) others_unwanted: Vec<Key>,
    /// The errno it says that with, `EINVAL` if none is given, and how often it does.
    pub(crate) unwanted_because: Option<i32>,
    pub(crate) unwanted_times: Option<usize>,
    /// Nothing can be written to tables of this name.
    pub(crate) stuck: Option<&'static str>,
    /// The kernel does not answer.
    pub(crate) mute: bool,
    pub(crate) generation: u32,
    /// Nobody hears of others' changes during a write, and somebody makes one.
    pub(crate) unheard: bool,
}

impl Fake {
    /// Changes something as somebody else.
    pub(crate) fn meddle(&self, change: impl FnOnce(&mut Ruleset)) {
        let mut state = self.0.borrow_mut();
        change(&mut state.ruleset);
        state.generation += 1;
    }
}

impl Kernel for Fake {
    fn apply(&mut self, transaction: &Transaction) -> Result<Applied, Error> {
        let mut state = self.0.borrow_mut();
        let too_many = state.most.is_some_and(|most| state.applied.len() >= most);
        if state.failures > 0 || too_many {
            state.failures = state.failures.saturating_sub(1);
            return Err(Error::Send {
                what: "a transaction",
                bytes: 0,
                source: io::Error::from_raw_os_error(libc::ENOBUFS),
            });
        }
        let refused = |path, errno| {
            let first = Refusal {
                path,
                source: io::Error::from_raw_os_error(errno),
                detail: String::new(),
            };
            Error::Refused {
                first: Box::new(first),
                others: Vec::new(),
            }
        };
        for op in &transaction.ops {
            let Op::AddElements(_, _, _, elements) = op else {
                continue;
            };
            let unwanted = |element: &Element| state.unwanted.as_ref() == Some(&element.key);
            if let Some(index) = elements.iter().position(unwanted) {
                let errno = state.unwanted_because.unwrap_or(libc::EINVAL);
                if let Some(times) = &mut state.unwanted_times {
                    *times -= 1;
                    if *times == 0 {
                        state.unwanted = None;
                    }
                }
                return Err(refused(ObjectPath::of(op, Some(index)), errno));
            }
        }
        let others: Vec<Refusal> = unwanted_of(transaction, &state.others_unwanted);
        let mut others = others.into_iter();
        if let Some(first) = others.next() {
            return Err(Error::Refused {
                first: Box::new(first),
                others: others.collect(),
            });
        }
        let mut ops = transaction.ops.iter();
        if let Some(op) = ops.find(|op| state.stuck == Some(table_of(op))) {
            return Err(refused(ObjectPath::of(op, None), libc::EINVAL));
        }
        if let Err((index, _)) = simulate::apply(&mut state.ruleset, transaction) {
            let place = transaction
                .ops
                .get(index)
                .map(|op| ObjectPath::of(op, None));
            return Err(refused(
                place.unwrap_or(ObjectPath::Transaction),
                libc::ENOENT,
            ));
        }
        state.applied.push(transaction.clone());
        state.generation += 1 + u32::from(state.unheard);
        Ok(Applied {
            unheard: state.unheard,
            ..Applied::default()
        })
    }

    fn read(&mut self, names: &[&str], _: &Ruleset) -> Result<Ruleset, Error> {
        let mut state = self.0.borrow_mut();
        state.reads += 1;
        let mut ruleset = state.ruleset.clone();
        ruleset
            .tables
            .retain(|id, _| names.contains(&id.name.as_str()));
        for table in ruleset.tables.values_mut() {
            // As from the kernel: what packets add is left out.
            let sets = table.sets.values_mut();
            for set in sets.filter(|set| set.declaration.timeout.is_some()) {
                set.elements.clear();
            }
        }
        Ok(ruleset)
    }

    fn elements(&mut self, table: &TableId, set: &str) -> Result<Vec<Element>, Error> {
        let mut state = self.0.borrow_mut();
        state.reads_of_sets += 1;
        let table = state.ruleset.tables.get(table);
        let Some(set) = table.and_then(|table| table.sets.get(set)) else {
            return Err(Error::Receive {
                what: "the elements of a set",
                source: io::Error::from_raw_os_error(libc::ENOENT),
            });
        };
        let mut elements = set.elements.clone();
        elements.extend(state.timed_out.clone());
        elements.sort();
        Ok(elements)
    }

    fn generation(&mut self) -> Result<u32, Error> {
        let state = self.0.borrow();
        if state.mute {
            return Err(Error::Receive {
                what: "the ruleset's generation",
                source: io::Error::from_raw_os_error(libc::EIO),
            });
        }
        Ok(state.generation)
    }
}

/// The refusals of elements that are not wanted, one of each operation as from the kernel.
fn unwanted_of(transaction: &Transaction, unwanted: &[Key]) -> Vec<Refusal> {
    let ops = transaction.ops.iter();
    let refused = ops.filter_map(|op| {
        let Op::AddElements(_, _, _, elements) = op else {
            return None;
        };
        let index = elements.iter().position(|it| unwanted.contains(&it.key))?;
        Some(Refusal {
            path: ObjectPath::of(op, Some(index)),
            source: io::Error::from_raw_os_error(libc::EINVAL),
            detail: String::new(),
        })
    });
    refused.collect()
}

/// The name of the table that an operation is about.
fn table_of(op: &Op) -> &str {
    let (Op::AddTable(table)
    | Op::DeleteTable(table)
    | Op::AddSet(table, ..)
    | Op::DeleteSet(table, _)
    | Op::FlushSet(table, _)
    | Op::DeleteStray(table, _)
    | Op::AddChain(table, ..)
    | Op::FlushChain(table, _)
    | Op::DeleteChain(table, _)
    | Op::AddRule(table, ..)
    | Op::AddElements(table, ..)
    | Op::DeleteElements(table, ..)) = op;
    table.name.as_str()
}

#[derive(Default)]
pub(crate) struct Heard(Mutex<Vec<String>>);

impl Reporter for Heard {
    fn notice(&self, notice: &Notice) {
        let line = format!("{}: {}", notice.subject, notice.message);
        self.0.lock().unwrap().push(line);
    }

    fn failed(&self, error: &Error) {
        self.0.lock().unwrap().push(error.to_string());
    }

    fn flows_stay(&self, error: &Error) {
        self.0.lock().unwrap().push(error.to_string());
    }
}

pub(crate) fn service(name: &str, cluster_ips: &[&str], ports: &[u16]) -> Service {
    Service {
        name: ObjectName::new("shop", name),
        created: None,
        kind: ServiceKind::ClusterIp,
        cluster_ips: cluster_ips.iter().map(|ip| ip.parse().unwrap()).collect(),
        ports: ports
            .iter()
            .map(|port| ServicePort {
                name: format!("p{port}").into(),
                protocol: Protocol::Tcp,
                port: *port,
                node_port: None,
            })
            .collect(),
        external_ips: vec![],
        load_balancer_ips: vec![],
        source_ranges: vec![],
        external_policy: TrafficPolicy::Cluster,
        internal_policy: TrafficPolicy::Cluster,
        affinity_seconds: None,
        health_check_node_port: None,
    }
}

pub(crate) fn slice(
    name: &str,
    service: &Service,
    family: Family,
    endpoints: &[u8],
) -> EndpointSlice {
    let address = |last: u8| match family {
        Family::V4 => IpAddr::from([10, 244, 1, last]),
        Family::V6 => format!("fd00:10:244:1::{last:x}").parse().unwrap(),
    };
    EndpointSlice {
        name: ObjectName::new("shop", name),
        service: service.name.clone(),
        created: None,
        family,
        ports: service
            .ports
            .iter()
            .map(|port| SlicePort {
                name: port.name.clone(),
                protocol: port.protocol,
                port: 8000 + port.port,
            })
            .collect(),
        endpoints: endpoints
            .iter()
            .map(|last| Endpoint {
                address: address(*last),
                ready: true,
                serving: true,
                terminating: false,
                node: Some(if last % 2 == 0 { "node-1" } else { "node-2" }.into()),
                hints: None,
            })
            .collect(),
        triggered_at_ms: None,
    }
}

pub(crate) fn node() -> Node {
    Node {
        name: "node-1".into(),
        internal_ips: vec!["192.168.10.1".parse().unwrap()],
        external_ips: vec![],
        pod_cidrs: vec![],
        zone: None,
        going_away: false,
    }
}

pub(crate) fn put(object: impl Into<Object>) -> Event {
    Event::Apply(object.into())
}

impl From<Service> for Object {
    fn from(service: Service) -> Self {
        Object::Service(service)
    }
}

impl From<EndpointSlice> for Object {
    fn from(slice: EndpointSlice) -> Self {
        Object::EndpointSlice(slice)
    }
}

impl From<Node> for Object {
    fn from(node: Node) -> Self {
        Object::Node(node)
    }
}

pub(crate) fn delete(kind: Kind, name: &str) -> Event {
    Event::Delete(ObjectRef::new(kind, ObjectName::new("shop", name)))
}

/// The events of complete lists that hold the given objects.
pub(crate) fn lists(objects: Vec<Object>) -> Vec<Event> {
    let mut events: Vec<_> = Kind::SERVICES.map(Event::ListStarted).into();
    events.extend(objects.into_iter().map(Event::Apply));
    events.extend(Kind::SERVICES.map(Event::ListComplete));
    events
}

pub(crate) struct Bench {
    pub(crate) kernel: Fake,
    pub(crate) metrics: Metrics,
    pub(crate) heard: Heard,
    pub(crate) settings: ServiceSettings,
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self {
            kernel: Fake::default(),
            metrics: Metrics::new().unwrap(),
            heard: Heard::default(),
            settings: ServiceSettings {
                detect_local: DetectLocal::ClusterCidr(vec!["10.244.0.0/16".parse().unwrap()]),
                ..ServiceSettings::default()
            },
        }
    }

    pub(crate) fn reconciler(&self) -> Reconciler<'_, Fake> {
        let (kernel, settings) = (self.kernel.clone(), self.settings.clone());
        Reconciler::new(kernel, settings, &self.metrics, &self.heard)
    }

    pub(crate) fn heard(&self) -> Vec<String> {
        std::mem::take(&mut *self.heard.0.lock().unwrap())
    }

    /// The transactions since the last call.
    pub(crate) fn applied(&self) -> Vec<Transaction> {
        std::mem::take(&mut self.kernel.0.borrow_mut().applied)
    }

    pub(crate) fn assert_as_wanted(&self, reconciler: &Reconciler<Fake>) {
        let wanted = services::wanted(reconciler.store(), &self.settings).0;
        let actual = self.kernel.0.borrow().ruleset.clone();
        assert_eq!(meaning(&actual), meaning(&wanted));
        let service_tables = Family::ALL.map(|family| actual.tables.get(&table_id(family)));
        for (name, chain) in service_tables
            .iter()
            .flatten()
            .flat_map(|table| &table.chains)
        {
            assert_eq!(
                services::is_base_chain(name),
                chain.base.is_some(),
                "{name}"
            );
        }
    }
}

pub(crate) fn handle(reconciler: &mut Reconciler<Fake>, events: Vec<Event>) -> Outcome {
    reconciler.handle(events.into_iter().map(Delivery::now))
}

/// Heals, and tells what was achieved and whether something was put back.
pub(crate) fn heal(reconciler: &mut Reconciler<Fake>) -> (Outcome, bool) {
    let (outcomes, changed) = reconciler.heal();
    (outcomes.together(), changed)
}

/// A ruleset without what may depend on history: which endpoint has which index, and shared
/// chains, with their sets, that wait to be used again.
pub(crate) fn meaning(ruleset: &Ruleset) -> Ruleset {
    let mut ruleset = ruleset.clone();
    for table in ruleset.tables.values_mut() {
        let verdicts = |elements: &[Element]| -> Vec<Name> {
            let targets = elements.iter().filter_map(|e| match &e.value {
                crate::nft::Value::Verdict(verdict) => verdict.target().cloned(),
                _ => None,
            });
            targets.collect()
        };
        let mut reached: BTreeSet<Name> = BTreeSet::new();
        let mut next: Vec<Name> = table
            .sets
            .values()
            .flat_map(|set| verdicts(&set.elements))
            .collect();
        while let Some(name) = next.pop() {
            let rules = table.chains.get(&name).map(|chain| chain.rules.clone());
            if reached.insert(name) {
                let statements = rules.into_iter().flatten().flat_map(|r| r.statements);
                next.extend(statements.filter_map(|statement| match statement {
                    crate::nft::Statement::Verdict(verdict) => verdict.target().cloned(),
                    _ => None,
                }));
            }
        }
        let learns = reached
            .iter()
            .any(|name| name.as_str().starts_with("learn-"));
        table.chains.retain(|name, _| {
            let name_text = name.as_str();
            let by_learning =
                ["learn-prerouting", "learn-output", "learn-new"].contains(&name_text);
            let (role, namespace) = name_text.split_once('/').unwrap_or((name_text, ""));
            let counted = role
                .rsplit_once('-')
                .is_some_and(|(_, n)| n.parse::<u32>().is_ok());
            let listed = name_text.starts_with("sources-");
            let shared = counted || by_learning || listed || !namespace.is_empty();
            reached.contains(name) || (by_learning && learns) || !shared
        });
        let chains = &table.chains;
        table.sets.retain(|name, _| {
            let of = name.as_str().split_once('/');
            of.is_none_or(|(_, of)| chains.contains_key(format!("sticky/{of}").as_str()))
        });
        table
            .sets
            .retain(|name, _| reached.contains(name) || !name.as_str().starts_with("sources-"));
        for set in [
            ServiceSet::Endpoints,
            ServiceSet::LocalEndpoints,
            ServiceSet::NodePortEndpoints,
            ServiceSet::NodePortLocalEndpoints,
        ] {
            let Some(set) = table.sets.get_mut(&set.name()) else {
                continue;
            };
            let mut values: BTreeMap<Vec<u8>, Vec<_>> = BTreeMap::new();
            for element in &set.elements {
                let key = element.key.as_bytes();
                let frontend = key[..key.len() - 4].to_vec();
                values
                    .entry(frontend)
                    .or_default()
                    .push(element.value.clone());
            }
            for element in &mut set.elements {
                let key = element.key.as_bytes();
                let (frontend, index) = key.split_at(key.len() - 4);
                let index = u32::from_ne_bytes(index.try_into().unwrap());
                let values = values.get_mut(frontend).unwrap();
                values.sort();
                element.value = values[index as usize].clone();
            }
        }
    }
    ruleset
}

#[test]
fn nothing_is_written_before_all_lists_are_complete() {
    let bench = Bench::new();
    let mut reconciler = bench.reconciler();
    let web = service("web", &["10.96.0.10"], &[80]);
    let events = lists(vec![web.into()]);
    let last = events.len() - 1;
    for event in &events[..last] {
        assert_eq!(
            handle(&mut reconciler, vec![event.clone()]),
            Outcome::Waiting
        );
    }
    assert_eq!(bench.kernel.0.borrow().reads, 0);
    assert!(bench.applied().is_empty());
    assert_eq!(
        handle(&mut reconciler, vec![events[last].clone()]),
        Outcome::Synced
    );
    bench.assert_as_wanted(&reconciler);
    assert_eq!(
        bench.applied().len(),
        1,
        "the first program is one transaction"
    );
}

#[test]
fn one_replaced_endpoint_is_two_elements() {
    let bench = Bench::new();
    let mut reconciler = bench.reconciler();
    let web = service("web", &["10.96.0.10"], &[80]);
    let endpoints: Vec<u8> = (1..=10).collect();
    let before = slice("web-1", &web, Family::V4, &endpoints);
    handle(
        &mut reconciler,
        lists(vec![node().into(), web.clone().into(), before.into()]),
    );
    bench.applied();
    let mut replaced = endpoints.clone();
    replaced[3] = 201;
    let after = slice("web-1", &web, Family::V4, &replaced);
    assert_eq!(handle(&mut reconciler, vec![put(after)]), Outcome::Synced);
    let applied = bench.applied();
    let ops: Vec<_> = applied.iter().flat_map(|t| &t.ops).collect();
    let touched: Vec<_> = ops
        .iter()
        .map(|op| match op {
            Op::AddElements(_, set, _, e) => ("add", set.as_str(), e.len()),
            Op::DeleteElements(_, set, _, e) => ("delete", set.as_str(), e.len()),
            other => panic!("{other:?}"),
        })
        .collect();
    // Endpoint 4 was on this node, so its hairpin pair goes too.
    assert_eq!(
        touched,
        [
            ("delete", "endpoints", 1),
            ("delete", "hairpin", 1),
            ("add", "endpoints", 1)
        ]
    );
    bench.assert_as_wanted(&reconciler);
}

#[test]
fn a_new_number_of_endpoints_brings_its_chain_first() {
    let bench = Bench::new();
    let mut reconciler = bench.reconciler();
    let web = service("web", &["10.96.0.10"], &[80]);
    let two = slice("web-1", &web, Family::V4, &[1, 3]);
    handle(
        &mut reconciler,
        lists(vec![web.clone().into(), two.clone().into()]),
    );
    bench.applied();
    let three = slice("web-1", &web, Family::V4, &[1, 3, 5]);
    handle(&mut reconciler, vec![put(three.clone())]);
    let applied = bench.applied();
    assert_eq!(applied.len(), 2);
    assert!(
        applied[0]
            .ops
            .iter()
            .all(|op| matches!(op, Op::AddChain(..) | Op::AddRule(..)))
    );
    assert!(applied[1].elements() == applied[1].ops.iter().map(Op::elements).sum::<usize>());
    bench.assert_as_wanted(&reconciler);
    // Back and forth: the chains are there already.
    for object in [two, three] {
        handle(&mut reconciler, vec![put(object)]);
        assert_eq!(bench.applied().len(), 1);
        bench.assert_as_wanted(&reconciler);
    }
    let lb_2 = Name::from("lb-2");
    let has = |bench: &Bench| {
        let state = bench.kernel.0.borrow();
        state.ruleset.tables[&table_id(Family::V4)]
            .chains
            .contains_key(&lb_2)
    };
    assert!(has(&bench), "an unused chain stays for a while");
    reconciler.remove_chains_unused_since(Instant::now());
    assert!(!has(&bench));
    bench.assert_as_wanted(&reconciler);
}

#[test]
fn a_shared_element_stays_until_nobody_asks_for_it() {
    let bench = Bench::new();
    let mut reconciler = bench.reconciler();
    let web = service("web", &["10.96.0.10"], &[80]);
    let api = service("api", &["10.96.0.11"], &[80]);
    handle(
        &mut reconciler,
        lists(vec![
            web.clone().into(),
            api.clone().into(),
            node().into(),
            slice("web-1", &web, Family::V4, &[2]).into(),
            slice("api-1", &api, Family::V4, &[2]).into(),
        ]),
    );
    let hairpins = || {
        let state = bench.kernel.0.borrow();
        let table = &state.ruleset.tables[&table_id(Family::V4)];
        table.sets[&ServiceSet::Hairpin.name()].elements.len()
    };
    assert_eq!(hairpins(), 1);
    handle(&mut reconciler, vec![delete(Kind::Service, "web")]);
    assert_eq!(hairpins(), 1);
    handle(&mut reconciler, vec![delete(Kind::EndpointSlice, "api-1")]);
    assert_eq!(hairpins(), 0);
    bench.assert_as_wanted(&reconciler);
}

#[test]
fn a_restart_with_rules_in_place_changes_only_what_differs() {
    let bench = Bench::new();
    let web = service("web", &["10.96.0.10", "fd00:10:96::a"], &[80, 443]);
    let objects = |last: u8| {
        lists(vec![
            web.clone().into(),
            slice("web-1", &web, Family::V4, &[1, 2, last]).into(),
            slice("web-2", &web, Family::V6, &[1, 2, last]).into(),
        ])
    };
    handle(&mut bench.reconciler(), objects(3));
    bench.applied();
    let mut same = bench.reconciler();
    assert_eq!(handle(&mut same, objects(3)), Outcome::Synced);
    assert!(
        bench.applied().is_empty(),
        "nothing changed while it was away"
    );
    let mut other = bench.reconciler();
    assert_eq!(handle(&mut other, objects(5)), Outcome::Synced);
    let applied = bench.applied();
    assert_eq!(applied.len(), 1);
    for op in &applied[0].ops {
        assert!(
            matches!(op, Op::AddElements(..) | Op::DeleteElements(..)),
            "{op:?}"
        );
    }
    bench.assert_as_wanted(&other);
}

#[test]
fn after_a_failure_the_kernel_is_read_and_repaired() {
    let bench = Bench::new();
    let mut reconciler = bench.reconciler();
    let web = service("web", &["10.96.0.10"], &[80]);
    let slice_of = |endpoints: &[u8]| put(slice("web-1", &web, Family::V4, endpoints));
    handle(&mut reconciler, lists(vec![web.clone().into()]));
    // Someone else removes an element that the next transaction wants to replace.
    handle(&mut reconciler, vec![slice_of(&[1, 3])]);
    let endpoints = ServiceSet::Endpoints.name();
    bench
        .kernel
        .0
        .borrow_mut()
        .ruleset
        .tables
        .get_mut(&table_id(Family::V4))
        .unwrap()
        .sets
        .get_mut(&endpoints)
        .unwrap()
        .elements
        .clear();
    assert_eq!(
        handle(&mut reconciler, vec![slice_of(&[1, 5])]),
        Outcome::Synced
    );
    bench.assert_as_wanted(&reconciler);
    assert!(bench.heard()[0].contains("the kernel refused"));
    // The kernel cannot be written at all for a while.
    bench.kernel.0.borrow_mut().failures = 3;
    assert_eq!(
        handle(&mut reconciler, vec![slice_of(&[1, 7])]),
        Outcome::Failed
    );
    assert_eq!(
        handle(&mut reconciler, vec![slice_of(&[9])]),
        Outcome::Failed
    );
    assert_eq!(reconciler.resync(), Outcome::Synced);
    bench.assert_as_wanted(&reconciler);
}

#[test]
fn healing_reads_nothing_unless_somebody_else_wrote() {
    let bench = Bench::new();
    let mut reconciler = bench.reconciler();
    let web = service("web", &["10.96.0.10"], &[80]);
    handle(&mut reconciler, lists(vec![web.clone().into()]));
    let reads = || bench.kernel.0.borrow().reads;
    let before = reads();
    assert_eq!(heal(&mut reconciler), (Outcome::Synced, false));
    // Writes of one's own are nobody else's.
    let endpoints = slice("web-1", &web, Family::V4, &[1, 2]);
    handle(&mut reconciler, vec![put(endpoints)]);
    assert_eq!(heal(&mut reconciler), (Outcome::Synced, false));
    assert_eq!(reads(), before);
    bench.kernel.meddle(|ruleset| ruleset.tables.clear());
    assert_eq!(heal(&mut reconciler), (Outcome::Synced, true));
    assert_eq!(reads(), before + 1);
    bench.assert_as_wanted(&reconciler);
    assert_eq!(heal(&mut reconciler), (Outcome::Synced, false));
    // Somebody who minds their own tables.
    bench.kernel.meddle(|_| {});
    assert_eq!(heal(&mut reconciler), (Outcome::Synced, false));
    assert_eq!(reads(), before + 2);
    assert_eq!(heal(&mut reconciler), (Outcome::Synced, false));
    assert_eq!(reads(), before + 2);
}

#[test]
fn a_change_during_a_write_that_nobody_heard_is_looked_for() {
    let bench = Bench::new();
    let mut reconciler = bench.reconciler();
    let web = service("web", &["10.96.0.10"], &[80]);
    handle(&mut reconciler, lists(vec![web.clone().into()]));
    assert!(!reconciler.take_missed_notifications());
    bench.kernel.0.borrow_mut().unheard = true;
    let endpoints = slice("web-1", &web, Family::V4, &[1, 2]);
    handle(&mut reconciler, vec![put(endpoints)]);
    assert!(reconciler.take_missed_notifications());
    assert!(!reconciler.take_missed_notifications());
    let reads = bench.kernel.0.borrow().reads;
    reconciler.heal();
    assert_eq!(bench.kernel.0.borrow().reads, reads + 1);
}

#[test]
fn a_difference_that_an_audit_finds_is_read_although_nobody_wrote() {
    let bench = Bench::new();
    let mut reconciler = bench.reconciler();
    assert!(reconciler.snapshot().is_none(), "nothing is in force yet");
    let web = service("web", &["10.96.0.10"], &[80]);
    handle(&mut reconciler, lists(vec![web.into()]));
    let snapshot = reconciler.snapshot().expect("it is in force");
    let keys = SumKeys::default();
    let compare = |snapshot| audit::compare(&mut bench.kernel.clone(), &keys, snapshot).unwrap();
    assert!(compare(snapshot).is_empty());
    // What changes without a trace in the generation.
    let id = table_id(Family::V4);
    let frontends = ServiceSet::Frontends.name();
    let forget = |ruleset: &mut Ruleset| {
        let table = ruleset.tables.get_mut(&id).unwrap();
        table.sets.get_mut(&frontends).unwrap().elements.clear();
    };
    forget(&mut bench.kernel.0.borrow_mut().ruleset);
    let difference = compare(reconciler.snapshot().unwrap());
    assert_eq!(difference.len(), 1);
    assert_eq!(heal(&mut reconciler), (Outcome::Synced, false));
    reconciler.kernel.expect_nothing();
    assert_eq!(heal(&mut reconciler), (Outcome::Synced, true));
    bench.assert_as_wanted(&reconciler);
}

#[test]
fn an_audit_reads_only_after_others_wrote() {
    let bench = Bench::new();
    let mut reconciler = bench.reconciler();
    let web = service("web", &["10.96.0.10"], &[80]);
    handle(&mut reconciler, lists(vec![web.clone().into()]));
    let (snapshots, received) = std::sync::mpsc::sync_channel(1);
    let (_found, findings) = mpsc::channel(1);
    let mut audits = Audits::new(AUDIT_EVERY, snapshots, findings);
    let same = || {
        let told = bench.metrics.encode();
        let series = "nftlet_audits_total{result=\"same\"} ";
        let line = told.lines().find_map(|line| line.strip_prefix(series));
        line.map_or(0, |count| count.parse::<u64>().unwrap())
    };
    reconciler.audit(&mut audits);
    assert!(received.try_recv().is_err());
    assert_eq!(same(), 1);

    bench.kernel.meddle(|_| {});
    // It waits for calm, for a while.
    let mut looks = 0;
    let snapshot = loop {
        let change = slice("web-1", &web, Family::V4, &[1 + looks % 200]);
        handle(&mut reconciler, vec![put(change)]);
        reconciler.audit(&mut audits);
        match received.try_recv() {
            Ok(snapshot) => break snapshot,
            Err(_) => looks += 1,
        }
    };
    assert!(looks > 10, "{looks}");
    let keys = SumKeys::default();
    handle(
        &mut reconciler,
        vec![put(slice("web-1", &web, Family::V4, &[250]))],
    );
    let compare = |snapshot| audit::compare(&mut bench.kernel.clone(), &keys, snapshot);
    // What the reconciler wrote meanwhile must not be taken for somebody else's.
    let finding = audit::Finding::new(&snapshot, compare(snapshot.clone()));
    assert_eq!(reconciler.judge(&mut audits, finding), Verdict::Again);
    reconciler.audit(&mut audits);
    let snapshot = received.try_recv().expect("another round");
    handle(&mut reconciler, vec![]);
    let finding = audit::Finding::new(&snapshot, compare(snapshot.clone()));
    assert_eq!(reconciler.judge(&mut audits, finding), Verdict::Same);
    assert_eq!(same(), 2);

    // The next one knows that nobody has written since, whatever the reconciler wrote.
    handle(
        &mut reconciler,
        vec![put(slice("web-1", &web, Family::V4, &[251]))],
    );
    reconciler.audit(&mut audits);
    assert!(received.try_recv().is_err());
    assert_eq!(same(), 3);
    bench.kernel.meddle(|_| {});
    reconciler.audit(&mut audits);
    reconciler.audit(&mut audits);
    assert!(received.try_recv().is_ok());
}

#[test]
fn services_without_local_endpoints_are_counted_by_policy() {
    let bench = Bench::new();
    let mut reconciler = bench.reconciler();
    let mut web = service("web", &["10.96.0.10"], &[80, 443]);
    web.external_ips = vec!["198.51.100.7".parse().unwrap()];
    web.external_policy = TrafficPolicy::Local;
    let mut dns = service("dns", &["10.96.0.11"], &[53]);
    dns.internal_policy = TrafficPolicy::Local;
    let expect = |internal: usize, external: usize| {
        let text = bench.metrics.encode();
        for (policy, count) in [("internal", internal), ("external", external)] {
            let line = format!(
                "kubeproxy_sync_proxy_rules_no_local_endpoints_total{{ip_family=\"IPv4\",traffic_policy=\"{policy}\"}} {count}\n"
            );
            assert!(text.contains(&line), "{line}{text}");
        }
    };
    let mut objects: Vec<Object> = vec![node().into(), web.clone().into(), dns.clone().into()];
    handle(&mut reconciler, lists(objects.clone()));
    // Without any endpoint they are refused like all others.
    expect(0, 0);
    // Odd ones are on another node.
    objects.push(slice("web-1", &web, Family::V4, &[1, 3]).into());
    objects.push(slice("dns-1", &dns, Family::V4, &[1]).into());
    handle(&mut reconciler, objects.into_iter().map(put).collect());
    expect(1, 1);
    let local = slice("web-1", &web, Family::V4, &[1, 2]);
    handle(&mut reconciler, vec![put(local)]);
    expect(1, 0);
    dns.internal_policy = TrafficPolicy::Cluster;
    handle(&mut reconciler, vec![put(dns)]);
    expect(0, 0);
    handle(&mut reconciler, vec![delete(Kind::EndpointSlice, "web-1")]);
    handle(&mut reconciler, vec![delete(Kind::Service, "web")]);
    expect(0, 0);
}

#[test]
fn while_a_retry_is_due_events_are_taken_over_without_touching_the_kernel() {
    let bench = Bench::new();
    let mut reconciler = bench.reconciler();
    let web = service("web", &["10.96.0.10"], &[80]);
    handle(&mut reconciler, lists(vec![web.clone().into()]));
    bench.kernel.0.borrow_mut().failures = 2;
    let slice_of = |endpoints: &[u8]| put(slice("web-1", &web, Family::V4, endpoints));
    assert_eq!(
        handle(&mut reconciler, vec![slice_of(&[1])]),
        Outcome::Failed
    );
    let reads = bench.kernel.0.borrow().reads;
    for last in 2..50 {
        reconciler.take_over([Delivery::now(slice_of(&[last]))]);
    }
    assert_eq!(bench.kernel.0.borrow().reads, reads);
    assert_eq!(reconciler.resync(), Outcome::Synced);
    assert_eq!(bench.kernel.0.borrow().reads, reads + 1);
    bench.assert_as_wanted(&reconciler);
}

#[test]
fn a_failure_to_remove_unused_chains_is_repaired_at_once() {
    let bench = Bench::new();
    let mut reconciler = bench.reconciler();
    let web = service("web", &["10.96.0.10"], &[80]);
    let two = slice("web-1", &web, Family::V4, &[1, 3]);
    let objects = vec![web.clone().into(), two.into()];
    handle(&mut reconciler, lists(objects));
    let one = slice("web-1", &web, Family::V4, &[1]);
    handle(&mut reconciler, vec![put(one)]);
    // Someone else removes the whole table, with the chain that is about to be removed.
    bench.kernel.0.borrow_mut().ruleset = Ruleset::default();
    let removed = reconciler.remove_chains_unused_since(Instant::now());
    assert_eq!(removed.together(), Outcome::Synced);
    bench.assert_as_wanted(&reconciler);
    assert_eq!(bench.heard().len(), 1);
    let counted = |family, count| {
        format!(
            "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total{{ip_family=\"{family}\"}} {count}"
        )
    };
    let page = bench.metrics.encode();
    for line in [counted("IPv4", 1), counted("IPv6", 0)] {
        assert!(page.lines().any(|it| it == line), "{line}: {page}");
    }
}

#[tokio::test]
async fn a_cluster_that_does_not_tell_all_is_no_reason_to_restart() {
    let bench = Bench::new();
    let mut reconciler = bench.reconciler();
    let (begin, passed) = (Instant::now(), Arc::new(AtomicU64::new(0)));
    let clock = passed.clone();
    let health = Health::with_clock(Duration::from_secs(30), move || Moment {
        monotonic: begin + Duration::from_secs(clock.load(Ordering::Relaxed)),
        wall: SystemTime::now(),
    });
    let (events, received) = mpsc::channel(1);
    let (stop, stopped) = watch::channel(false);
    let signals = Signals {
        stop: stopped,
        once: false,
        foreign: std::sync::Arc::default(),
        audits: None,
        ready: Vec::new(),
        questions: None,
    };
    let test = async {
        let web = service("web", &["10.96.0.10"], &[80]);
        // There is room for one: when the last is sent, the ones before were taken.
        for event in [
            Event::ListStarted(Kind::Service),
            put(web),
            Event::ListComplete(Kind::Service),
        ] {
            events.send(Delivery::now(event)).await.unwrap();
        }
        passed.store(3600, Ordering::Relaxed);
        assert!(!health.healthz().healthy);
        assert_eq!(health.livez().message, None);
        stop.send_replace(true);
    };
    let (exit, ()) = tokio::join!(run(&mut reconciler, received, signals, &health), test);
    assert_eq!(exit, Exit::Stopped);
}

#[test]
fn what_the_kernel_refuses_is_left_out_and_the_rest_is_written() {
    let bench = Bench::new();
    let bad = service("bad", &["10.96.0.66"], &[80]);
    let good = service("good", &["10.96.0.10"], &[80]);
    let unwanted = Key::build()
        .address("10.96.0.66".parse().unwrap())
        .protocol(6)
        .port(80)
        .finish();
    bench.kernel.0.borrow_mut().unwanted = Some(unwanted.clone());
    let mut reconciler = bench.reconciler();
    let first = lists(vec![bad.clone().into(), good.clone().into()]);
    assert_eq!(handle(&mut reconciler, first), Outcome::Synced);
    let frontends = |table: &TableId| {
        let state = bench.kernel.0.borrow();
        state.ruleset.tables[table].sets[&ServiceSet::Frontends.name()]
            .elements
            .len()
    };
    let v4 = table_id(Family::V4);
    assert_eq!(frontends(&v4), 1);
    let heard = bench.heard();
    assert_eq!(heard.len(), 1);
    assert!(
        heard[0]
            .starts_with("Service shop/bad: the kernel refused element { 10.96.0.66 . tcp . 80"),
        "{}",
        heard[0]
    );
    // Changes of others go through; the service comes back when it has changed.
    let more = slice("good-1", &good, Family::V4, &[1, 2]);
    assert_eq!(handle(&mut reconciler, vec![put(more)]), Outcome::Synced);
    assert_eq!(bench.kernel.0.borrow().reads, 1, "no comparison was needed");
    let mended = service("bad", &["10.96.0.67"], &[80]);
    assert_eq!(handle(&mut reconciler, vec![put(mended)]), Outcome::Synced);
    assert_eq!(frontends(&v4), 2);
    // A service refused in an incremental write, forgiven when the kernel has changed its mind.
    assert_eq!(handle(&mut reconciler, vec![put(bad)]), Outcome::Synced);
    assert_eq!(frontends(&v4), 1);
    bench.kernel.0.borrow_mut().unwanted = None;
    reconciler.retry_quarantined();
    assert_eq!(handle(&mut reconciler, vec![]), Outcome::Synced);
    assert_eq!(frontends(&v4), 2);
    bench.assert_as_wanted(&reconciler);
}

#[test]
fn all_services_of_a_batch_that_the_kernel_refuses_are_left_out_after_one_comparison() {
    let bench = Bench::new();
    let frontend = |last| {
        let address = IpAddr::from([10, 96, 0, last]);
        Key::build().address(address).protocol(6).port(80).finish()
    };
    // Several of one operation, and one of the other address family.
    let v6 = "fd00:10:96::9".parse().unwrap();
    let v6 = Key::build().address(v6).protocol(6).port(80).finish();
    bench.kernel.0.borrow_mut().others_unwanted = vec![frontend(1), frontend(2), frontend(3), v6];
    let mut objects: Vec<Object> = (1..=5)
        .map(|n| service(&format!("web-{n}"), &[&format!("10.96.0.{n}")], &[80]).into())
        .collect();
    objects.push(service("web-6", &["fd00:10:96::9"], &[80]).into());
    let mut reconciler = bench.reconciler();
    assert_eq!(handle(&mut reconciler, lists(objects)), Outcome::Synced);
    let heard = bench.heard();
    assert_eq!(heard.len(), 4, "{heard:?}");
    let state = bench.kernel.0.borrow();
    assert_eq!(state.reads, 1);
    let frontends =
        &state.ruleset.tables[&table_id(Family::V4)].sets[&ServiceSet::Frontends.name()];
    assert_eq!(frontends.elements.len(), 2);
}

/// Everything that may happen to a small cluster.
fn event() -> impl Strategy<Value = Event> {
    let name = (0usize..4).prop_map(|n| ["a", "b", "c", "d"][n]);
    let a_service = (
        name.clone(),
        vec(0u8..3, 0..3),
        vec(prop_oneof![Just(80u16), Just(443)], 0..3),
        vec(0u8..3, 0..2),
        proptest::option::of(30080u16..30082),
        proptest::option::of(0i64..3),
        0u8..5,
        (
            any::<[bool; 2]>(),
            proptest::option::of(prop_oneof![Just(10u32), Just(10_800)]),
            vec(0u8..4, 0..3),
        ),
    )
        .prop_map(
            |(name, v4, ports, external, node_port, created, kind, more)| {
                let mut service = service(name, &[], &ports);
                service.ports.dedup();
                for port in &mut service.ports {
                    port.node_port = node_port.filter(|_| port.port == 80);
                }
                // Sometimes two services have the same ClusterIP: files can say so.
                service.cluster_ips = v4
                    .first()
                    .map(|n| IpAddr::from([10, 96, 0, 10 + n]))
                    .into_iter()
                    .chain(
                        v4.get(1)
                            .map(|n| format!("fd00:10:96::{n}").parse().unwrap()),
                    )
                    .collect();
                service.external_ips = external
                    .iter()
                    .map(|n| IpAddr::from([198, 51, 100, *n]))
                    .collect();
                let ([external_local, internal_local], affinity, ranges) = more;
                let policy = |local| match local {
                    true => TrafficPolicy::Local,
                    false => TrafficPolicy::Cluster,
                };
                service.external_policy = policy(external_local);
                service.internal_policy = policy(internal_local);
                service.affinity_seconds = affinity;
                service.load_balancer_ips = ranges
                    .iter()
                    .map(|n| IpAddr::from([203, 0, 113, *n]))
                    .collect();
                service.source_ranges = ranges
                    .iter()
                    .map(|n| format!("10.{n}.0.0/{}", 14 + n).parse().unwrap())
                    .collect();
                service.created = created;
                service.kind = match kind {
                    0 => ServiceKind::Headless,
                    1 => ServiceKind::ExternalName,
                    _ => ServiceKind::NodePort,
                };
                put(service)
            },
        );
    let a_slice = (
        name.clone(),
        0usize..2,
        any::<bool>(),
        vec(1u8..8, 0..5),
        vec(0u8..4, 5),
    )
        .prop_map(|(owner, number, v6, endpoints, states)| {
            let service = service(owner, &[], &[80, 443]);
            let family = if v6 { Family::V6 } else { Family::V4 };
            let slice_name = format!("{family}-{number}");
            let mut slice = slice(&slice_name, &service, family, &endpoints);
            for (endpoint, state) in slice.endpoints.iter_mut().zip(states) {
                endpoint.ready = state > 1;
                endpoint.terminating = state == 1;
            }
            put(slice)
        });
    let a_slice_goes = (any::<bool>(), 0usize..2).prop_map(|(v6, number)| {
        let family = if v6 { Family::V6 } else { Family::V4 };
        delete(Kind::EndpointSlice, &format!("{family}-{number}"))
    });
    let a_node = (1u8..3, any::<bool>()).prop_map(|(last, other)| {
        let mut node = node();
        node.internal_ips = vec![IpAddr::from([192, 168, 10, last])];
        if other {
            node.name = "node-2".into();
        }
        put(node)
    });
    let a_range = (0u8..3).prop_map(|n| {
        Event::Apply(Object::ServiceCidr(ServiceCidr {
            name: ObjectName::new("", "kubernetes"),
            cidrs: vec![format!("10.{}.0.0/16", 96 + n).parse().unwrap()],
        }))
    });
    prop_oneof![
        6 => a_service,
        6 => a_slice,
        2 => name.prop_map(|name| delete(Kind::Service, name)),
        2 => a_slice_goes,
        1 => a_node,
        1 => a_range,
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// However events are batched and whatever fails in between, the kernel ends where a new
    /// process that sees the final objects would bring it.
    #[test]
    fn histories_end_where_a_fresh_start_would(
        history in vec((vec(event(), 0..5), 0usize..12), 1..12),
    ) {
        let bench = Bench::new();
        let mut reconciler = bench.reconciler();
        handle(&mut reconciler, lists(vec![]));
        for (events, failures) in history {
            // One batch in four meets a kernel that fails one to three times.
            bench.kernel.0.borrow_mut().failures = failures.saturating_sub(8);
            let mut outcome = handle(&mut reconciler, events);
            while outcome != Outcome::Synced {
                outcome = reconciler.resync();
            }
            bench.kernel.0.borrow_mut().failures = 0;
            bench.assert_as_wanted(&reconciler);
        }
        reconciler.remove_chains_unused_since(Instant::now());
        let actual = bench.kernel.0.borrow().ruleset.clone();
        prop_assert_eq!(&meaning(&actual), &meaning(&reconciler.services.engine.tables().ruleset()));
        prop_assert_eq!(actual, reconciler.services.engine.tables().ruleset());
    }
}
