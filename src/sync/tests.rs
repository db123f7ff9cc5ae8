//! The controller against a model of the kernel.

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
use crate::netlink::{Applied, ConntrackError, Error, Refusal};
use crate::nft::{
    Element, Key, Name, ObjectPath, Op, Ruleset, SetKind, Table, TableId, Transaction, simulate,
};
use crate::serve::health::{ClockReading, Health};
use crate::serve::metrics::Registry;
use crate::services::{DetectLocal, ServiceSet, table_id};

mod audits;
mod comparisons;
mod engines;
mod evenness;
mod fake;
mod foreign;
mod healing;
mod histories;
mod large;
mod objects;
mod policies;
mod portions;
mod quarantine;
mod queries;
mod startup;
mod turns;
mod work;

pub(crate) use fake::{Fake, RecordedReports};
pub(crate) use objects::{delete, lists, node, put, restricted, service, slice, source_list};

pub(crate) struct Bench {
    pub(crate) kernel: Fake,
    pub(crate) registry: Registry,
    pub(crate) metrics: SyncMetrics,
    pub(crate) heard: RecordedReports,
    pub(crate) settings: ServiceSettings,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let registry = Registry::new().unwrap();
        Self {
            kernel: Fake::default(),
            metrics: SyncMetrics::register(&registry).unwrap(),
            registry,
            heard: RecordedReports::default(),
            settings: ServiceSettings {
                detect_local: DetectLocal::ClusterCidr(vec!["10.244.0.0/16".parse().unwrap()]),
                ..ServiceSettings::default()
            },
        }
    }

    pub(crate) fn controller(&self) -> Controller<'_, Fake> {
        let (kernel, settings) = (self.kernel.clone(), self.settings.clone());
        Controller::new(kernel, settings, &self.metrics, &self.heard)
    }

    pub(crate) fn heard(&self) -> Vec<String> {
        std::mem::take(&mut *self.heard.0.lock().unwrap())
    }

    /// The transactions since the last call.
    pub(crate) fn applied(&self) -> Vec<Transaction> {
        std::mem::take(&mut self.kernel.0.borrow_mut().applied)
    }

    /// Returns whether the IPv4 table has a chain.
    pub(crate) fn has_chain(&self, name: &Name) -> bool {
        let state = self.kernel.0.borrow();
        let table = &state.ruleset.tables[&table_id(Family::V4)];
        table.chains.contains_key(name)
    }

    pub(crate) fn assert_as_wanted(&self, controller: &Controller<Fake>) {
        let wanted = services::wanted(controller.store(), &self.settings).0;
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

pub(crate) fn handle(controller: &mut Controller<Fake>, events: Vec<Event>) -> Outcome {
    controller.handle(events.into_iter().map(Delivery::now))
}

/// Advances a paused clock until the shared chains that are unused now expire, and removes them.
pub(crate) async fn remove_unused_chains(controller: &mut Controller<'_, Fake>) -> Outcomes {
    let mut outcomes = Outcomes::default();
    while let Some(due) = controller.services.due() {
        tokio::time::sleep_until(due.into()).await;
        outcomes = controller.work(Engines::SERVICES);
    }
    outcomes
}

/// Heals, and returns the outcome and whether something was restored.
pub(crate) fn heal(controller: &mut Controller<Fake>) -> (Outcome, bool) {
    let (outcomes, changed) = controller.heal();
    (outcomes.together(), changed)
}

/// Removes the chains that draw indexes if there are no frontends.
fn remove_unused_draws(table: &mut Table) {
    let frontends = [ServiceSet::Frontends, ServiceSet::NodePorts];
    let mut frontends = frontends
        .iter()
        .filter_map(|set| table.sets.get(&set.name()));
    if frontends.any(|set| !set.elements.is_empty()) {
        return;
    }
    table
        .chains
        .retain(|name, _| !name.as_str().starts_with("draw-"));
    for map in ["draw", "draw-filled"] {
        if let Some(map) = table.sets.get_mut(map) {
            map.elements.clear();
        }
    }
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
            let rules = table.chains.get(&name).map(|chain| &chain.rules);
            if reached.insert(name) {
                let statements = rules.into_iter().flatten().flat_map(|r| &*r.statements);
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
            let listed = name_text.starts_with("sources-");
            let shared = by_learning || listed || name_text.contains('/');
            reached.contains(name) || (by_learning && learns) || !shared
        });
        remove_unused_draws(table);
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
                element.value = values[index as usize - 1].clone();
            }
        }
    }
    ruleset
}

#[test]
fn nothing_is_written_before_all_lists_are_complete() {
    let bench = Bench::new();
    let mut controller = bench.controller();
    let web = service("web", &["10.96.0.10"], &[80]);
    let events = lists(vec![web.into()]);
    let last = events.len() - 1;
    for event in &events[..last] {
        assert_eq!(
            handle(&mut controller, vec![event.clone()]),
            Outcome::Waiting
        );
    }
    assert_eq!(bench.kernel.0.borrow().reads, 0);
    assert!(bench.applied().is_empty());
    assert_eq!(
        handle(&mut controller, vec![events[last].clone()]),
        Outcome::Synced
    );
    bench.assert_as_wanted(&controller);
    assert_eq!(
        bench.applied().len(),
        1,
        "the first program is one transaction"
    );
}

#[test]
fn one_replaced_endpoint_is_two_elements() {
    let bench = Bench::new();
    let mut controller = bench.controller();
    let web = service("web", &["10.96.0.10"], &[80]);
    let endpoints: Vec<u8> = (1..=10).collect();
    let before = slice("web-1", &web, Family::V4, &endpoints);
    handle(
        &mut controller,
        lists(vec![node().into(), web.clone().into(), before.into()]),
    );
    bench.applied();
    let mut replaced = endpoints.clone();
    replaced[3] = 201;
    let after = slice("web-1", &web, Family::V4, &replaced);
    assert_eq!(handle(&mut controller, vec![put(after)]), Outcome::Synced);
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
    bench.assert_as_wanted(&controller);
}

#[test]
fn a_number_of_endpoints_changes_data_only() {
    let bench = Bench::new();
    let mut controller = bench.controller();
    let mut web = service("web", &["10.96.0.10"], &[80]);
    web.ports[0].node_port = Some(30_080);
    web.external_policy = TrafficPolicy::Local;
    let mut other = web.clone();
    other.name = ObjectName::new("shop", "other");
    other.cluster_ips = vec!["10.96.0.11".parse().unwrap()];
    other.ports[0].node_port = Some(30_081);
    handle(&mut controller, lists(vec![node().into(), other.into()]));
    bench.applied();
    let all: Vec<u8> = (1..=200).collect();
    let mut events = vec![put(web.clone())];
    events.extend(
        [1, 2, 3, 64, 65, 92, 200, 3, 0]
            .map(|count| put(slice("web-1", &web, Family::V4, &all[..count]))),
    );
    events.push(delete(Kind::Service, "web"));
    for event in events {
        handle(&mut controller, vec![event]);
        bench.assert_as_wanted(&controller);
        let applied = bench.applied();
        assert_eq!(applied.len(), 1);
        for op in &applied[0].ops {
            match op {
                Op::AddElements(_, _, declaration, _)
                | Op::DeleteElements(_, _, declaration, _)
                    if declaration.kind != SetKind::VerdictMap => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_new_list_of_source_ranges_brings_its_chain_first() {
    let bench = Bench::new();
    let mut controller = bench.controller();
    handle(&mut controller, lists(vec![restricted(8).into()]));
    bench.applied();
    handle(&mut controller, vec![put(restricted(16))]);
    let applied = bench.applied();
    assert_eq!(applied.len(), 2);
    let creates = |op: &Op| {
        matches!(
            op,
            Op::AddSet(..) | Op::AddElements(..) | Op::AddChain(..) | Op::AddRule(..)
        )
    };
    assert!(applied[0].ops.iter().all(creates));
    assert!(applied[1].elements() == applied[1].ops.iter().map(Op::elements).sum::<usize>());
    bench.assert_as_wanted(&controller);
    // Back and forth: the chains are there already.
    for length in [8, 16] {
        handle(&mut controller, vec![put(restricted(length))]);
        assert_eq!(bench.applied().len(), 1);
        bench.assert_as_wanted(&controller);
    }
    assert!(bench.has_chain(&source_list(8)), "it stays for a while");
    remove_unused_chains(&mut controller).await;
    assert!(!bench.has_chain(&source_list(8)));
    bench.assert_as_wanted(&controller);
}

#[test]
fn a_shared_element_stays_until_its_last_user_is_deleted() {
    let bench = Bench::new();
    let mut controller = bench.controller();
    let web = service("web", &["10.96.0.10"], &[80]);
    let api = service("api", &["10.96.0.11"], &[80]);
    handle(
        &mut controller,
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
    handle(&mut controller, vec![delete(Kind::Service, "web")]);
    assert_eq!(hairpins(), 1);
    handle(&mut controller, vec![delete(Kind::EndpointSlice, "api-1")]);
    assert_eq!(hairpins(), 0);
    bench.assert_as_wanted(&controller);
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
    handle(&mut bench.controller(), objects(3));
    bench.applied();
    let mut same = bench.controller();
    assert_eq!(handle(&mut same, objects(3)), Outcome::Synced);
    assert!(
        bench.applied().is_empty(),
        "nothing changed while it was away"
    );
    let mut other = bench.controller();
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
    let mut controller = bench.controller();
    let web = service("web", &["10.96.0.10"], &[80]);
    let slice_of = |endpoints: &[u8]| put(slice("web-1", &web, Family::V4, endpoints));
    handle(&mut controller, lists(vec![web.clone().into()]));
    // Another process removes an element that the next transaction replaces.
    handle(&mut controller, vec![slice_of(&[1, 3])]);
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
        handle(&mut controller, vec![slice_of(&[1, 5])]),
        Outcome::Synced
    );
    bench.assert_as_wanted(&controller);
    assert!(bench.heard()[0].contains("the kernel refused"));
    // The kernel cannot be written at all for a while.
    bench.kernel.0.borrow_mut().failures = 3;
    assert_eq!(
        handle(&mut controller, vec![slice_of(&[1, 7])]),
        Outcome::Failed
    );
    assert_eq!(
        handle(&mut controller, vec![slice_of(&[9])]),
        Outcome::Failed
    );
    assert_eq!(controller.resync(), Outcome::Synced);
    bench.assert_as_wanted(&controller);
}

#[test]
fn services_without_local_endpoints_are_counted_by_policy() {
    let bench = Bench::new();
    let mut controller = bench.controller();
    let mut web = service("web", &["10.96.0.10"], &[80, 443]);
    web.external_ips = vec!["198.51.100.7".parse().unwrap()];
    web.external_policy = TrafficPolicy::Local;
    let mut dns = service("dns", &["10.96.0.11"], &[53]);
    dns.internal_policy = TrafficPolicy::Local;
    let expect = |internal: usize, external: usize| {
        let text = bench.registry.encode();
        for (policy, count) in [("internal", internal), ("external", external)] {
            let line = format!(
                "kubeproxy_sync_proxy_rules_no_local_endpoints_total{{ip_family=\"IPv4\",traffic_policy=\"{policy}\"}} {count}\n"
            );
            assert!(text.contains(&line), "{line}{text}");
        }
    };
    let mut objects: Vec<Object> = vec![node().into(), web.clone().into(), dns.clone().into()];
    handle(&mut controller, lists(objects.clone()));
    // Without any endpoint they are refused like all others.
    expect(0, 0);
    // Odd ones are on another node.
    objects.push(slice("web-1", &web, Family::V4, &[1, 3]).into());
    objects.push(slice("dns-1", &dns, Family::V4, &[1]).into());
    handle(&mut controller, objects.into_iter().map(put).collect());
    expect(1, 1);
    let local = slice("web-1", &web, Family::V4, &[1, 2]);
    handle(&mut controller, vec![put(local)]);
    expect(1, 0);
    dns.internal_policy = TrafficPolicy::Cluster;
    handle(&mut controller, vec![put(dns)]);
    expect(0, 0);
    handle(&mut controller, vec![delete(Kind::EndpointSlice, "web-1")]);
    handle(&mut controller, vec![delete(Kind::Service, "web")]);
    expect(0, 0);
}

#[test]
fn while_a_retry_is_due_events_are_taken_over_without_touching_the_kernel() {
    let bench = Bench::new();
    let mut controller = bench.controller();
    let web = service("web", &["10.96.0.10"], &[80]);
    handle(&mut controller, lists(vec![web.clone().into()]));
    bench.kernel.0.borrow_mut().failures = 2;
    let slice_of = |endpoints: &[u8]| put(slice("web-1", &web, Family::V4, endpoints));
    assert_eq!(
        handle(&mut controller, vec![slice_of(&[1])]),
        Outcome::Failed
    );
    let reads = bench.kernel.0.borrow().reads;
    for last in 2..50 {
        controller.apply([Delivery::now(slice_of(&[last]))]);
    }
    assert_eq!(bench.kernel.0.borrow().reads, reads);
    assert_eq!(controller.resync(), Outcome::Synced);
    assert_eq!(bench.kernel.0.borrow().reads, reads + 1);
    bench.assert_as_wanted(&controller);
}

#[tokio::test(start_paused = true)]
async fn a_failure_to_remove_unused_chains_is_repaired_at_once() {
    let bench = Bench::new();
    let mut controller = bench.controller();
    handle(&mut controller, lists(vec![restricted(8).into()]));
    handle(&mut controller, vec![put(restricted(16))]);
    // Another process removes the whole table, with the chain that is about to be removed.
    bench.kernel.0.borrow_mut().ruleset = Ruleset::default();
    let removed = remove_unused_chains(&mut controller).await;
    assert_eq!(removed.together(), Outcome::Synced);
    bench.assert_as_wanted(&controller);
    assert_eq!(bench.heard().len(), 1);
    let counted = |family, count| {
        format!(
            "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total{{ip_family=\"{family}\"}} {count}"
        )
    };
    let page = bench.registry.encode();
    for line in [counted("IPv4", 1), counted("IPv6", 0)] {
        assert!(page.lines().any(|it| it == line), "{line}: {page}");
    }
}

#[tokio::test]
async fn a_cluster_that_does_not_tell_all_is_no_reason_to_restart() {
    let bench = Bench::new();
    let mut controller = bench.controller();
    let (begin, passed) = (Instant::now(), Arc::new(AtomicU64::new(0)));
    let clock = passed.clone();
    let health = Health::with_clock(Duration::from_secs(30), move || ClockReading {
        monotonic: begin + Duration::from_secs(clock.load(Ordering::Relaxed)),
        wall: SystemTime::now(),
    });
    let (events, received) = mpsc::channel(1);
    let (stop, stopped) = watch::channel(false);
    let signals = Signals {
        stop: stopped,
        once: false,
        foreign: std::sync::Arc::default(),
        missed: std::sync::Arc::default(),
        audits: None,
        ready: Vec::new(),
        queries: None,
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
    let (exit, ()) = tokio::join!(run(&mut controller, received, signals, &health), test);
    assert_eq!(exit, Exit::Stopped);
}
