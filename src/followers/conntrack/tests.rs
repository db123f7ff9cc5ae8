use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Mutex;
use std::sync::mpsc::channel;
use std::time::Duration;

use super::cleaner::{Tracker, filters};
use super::queue::Received;
use super::*;
use crate::engine::Change as _;
use crate::followers::FollowerMetrics;
use crate::model::{Notice, ObjectName};
use crate::netlink::{ConntrackError, Error, FlowFilter};
use crate::nft;
use crate::serve::metrics::Registry;
use crate::services::{EndpointScope, Frontend, Replaced, Role, Route, ServiceChanges};
use crate::sync::Reporter;

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn flow(destination: &str, replier: &str) -> Flow {
    Flow {
        id: 1,
        zone: 0,
        source: at("10.244.9.9:4000"),
        destination: at(destination),
        replier: at(replier),
    }
}

fn targets(list: &[&str]) -> Box<[Target]> {
    let targets = list.iter().map(|text| (at(text).ip(), at(text).port()));
    targets.collect()
}

fn plan(protocol: Protocol, fronts: &[&str], chosen: &[&str], unchosen: &[&str]) -> ServicePlan {
    let mut frontends: Vec<Claim> = fronts
        .iter()
        .map(|front| match front.strip_prefix("node:") {
            Some(port) => Claim::NodePort(protocol, port.parse().unwrap()),
            None => Claim::Address(at(front).ip(), protocol, at(front).port()),
        })
        .collect();
    frontends.sort();
    ServicePlan {
        frontends: frontends
            .into_iter()
            .map(|at| Frontend {
                at,
                family: Family::V4,
                route: Route::Balance(Role::External, 0),
                firewalled: false,
            })
            .collect(),
        pools: [Pool {
            label: "shop/dns".into(),
            protocol,
            family: Family::V4,
            scope: EndpointScope::Cluster,
            targets: targets(chosen),
            unchosen: targets(unchosen),
        }]
        .into(),
        cluster_ips: [].into(),
        hairpin: [].into(),
        affinity: None,
        sources: [None, None],
    }
}

fn udp(fronts: &[&str], chosen: &[&str]) -> ServicePlan {
    plan(Protocol::Udp, fronts, chosen, &[])
}

fn changed(old: Option<&ServicePlan>, new: Option<&ServicePlan>) -> DirtyFrontends {
    let mut dirty = DirtyFrontends::default();
    dirty.change(old, new);
    dirty.set_node_ports(["192.168.10.0/24".parse::<IpNet>().unwrap()]);
    dirty
}

fn judge(dirty: &DirtyFrontends, destination: &str, replier: &str) -> FlowState {
    let own = ["192.168.10.1", "10.244.1.1"].map(|a| a.parse().unwrap());
    let own = dirty.node_port_addresses(own);
    dirty.evaluate(&flow(destination, replier), &own)
}

const VIP: &str = "10.96.0.10:53";

#[test]
fn flows_to_removed_endpoints_are_stale() {
    let old = udp(&[VIP], &["10.0.0.1:53", "10.0.0.2:53"]);
    let new = udp(&[VIP], &["10.0.0.2:53"]);
    let dirty = changed(Some(&old), Some(&new));
    assert_eq!(
        dirty.to_sweep().collect::<Vec<_>>(),
        [UdpFrontend::Address(at(VIP))]
    );
    assert_eq!(judge(&dirty, VIP, "10.0.0.1:53"), FlowState::Stale);
    assert_eq!(judge(&dirty, VIP, "10.0.0.2:53"), FlowState::Kept);
    assert_eq!(judge(&dirty, VIP, "10.0.0.2:54"), FlowState::Stale);
    for other in ["10.96.0.10:54", "10.96.0.11:53", "10.0.0.1:53"] {
        assert_eq!(judge(&dirty, other, "10.0.0.1:53"), FlowState::Unconcerned);
    }
}

#[test]
fn flows_that_began_before_the_service_had_endpoints_are_stale() {
    let (none, one) = (udp(&[VIP], &[]), udp(&[VIP], &["10.0.0.1:53"]));
    for old in [None, Some(&none)] {
        let dirty = changed(old, Some(&one));
        assert_eq!(judge(&dirty, VIP, VIP), FlowState::Stale);
        assert_eq!(judge(&dirty, VIP, "10.0.0.1:53"), FlowState::Kept);
    }
    let dirty = changed(Some(&one), Some(&none));
    assert_eq!(judge(&dirty, VIP, "10.0.0.1:53"), FlowState::Stale);
}

#[test]
fn translated_flows_of_a_removed_frontend_are_stale() {
    let external = "198.51.100.7:53";
    let old = udp(&[VIP, external], &["10.0.0.1:53"]);
    let new = udp(&[VIP], &["10.0.0.1:53"]);
    let dirty = changed(Some(&old), Some(&new));
    assert_eq!(judge(&dirty, external, "10.0.0.1:53"), FlowState::Stale);
    assert_eq!(judge(&dirty, external, external), FlowState::Kept);
    assert_eq!(judge(&dirty, VIP, "10.0.0.9:53"), FlowState::Unconcerned);
    // And back: a change of the service alone.
    let dirty = changed(Some(&new), Some(&old));
    assert_eq!(judge(&dirty, external, external), FlowState::Stale);
}

#[test]
fn endpoints_that_serve_without_being_chosen_keep_their_flows() {
    let old = udp(&[VIP], &["10.0.0.1:53", "10.0.0.2:53"]);
    let draining = plan(Protocol::Udp, &[VIP], &["10.0.0.1:53"], &["10.0.0.2:53"]);
    let dirty = changed(Some(&old), Some(&draining));
    assert!(dirty.is_empty(), "the same endpoints serve");
    let new = udp(&[VIP], &["10.0.0.1:53"]);
    let dirty = changed(Some(&draining), Some(&new));
    assert_eq!(judge(&dirty, VIP, "10.0.0.2:53"), FlowState::Stale);
}

#[test]
fn node_ports_are_recognised_on_own_addresses_inside_the_ranges() {
    let dirty = changed(None, Some(&udp(&["node:30053"], &["10.0.0.1:53"])));
    let gone = "10.0.0.9:53";
    assert_eq!(judge(&dirty, "192.168.10.1:30053", gone), FlowState::Stale);
    for other in ["192.168.10.2:30053", "10.244.1.1:30053", "192.168.10.1:53"] {
        assert_eq!(
            judge(&dirty, other, gone),
            FlowState::Unconcerned,
            "{other}"
        );
    }
    let v6 = flow("[fd00::1]:30053", "[fd00::9]:53");
    let own = HashSet::from([v6.destination.ip()]);
    assert_eq!(dirty.evaluate(&v6, &own), FlowState::Unconcerned);
}

#[test]
fn only_udp_is_looked_for_and_only_where_flows_can_be_stale() {
    let (one, two) = (["10.0.0.1:53"], ["10.0.0.1:53", "10.0.0.2:53"]);
    let tcp = |targets| plan(Protocol::Tcp, &[VIP], targets, &[]);
    assert!(changed(Some(&tcp(&two)), Some(&tcp(&one))).is_empty());
    assert!(changed(Some(&tcp(&two)), None).is_empty());
    let more = changed(Some(&udp(&[VIP], &one)), Some(&udp(&[VIP], &two)));
    assert_eq!(more.to_sweep().count(), 0);
    assert_eq!(
        judge(&more, VIP, two[1]),
        FlowState::Kept,
        "but it is known"
    );
}

#[test]
fn a_frontend_that_moves_between_services_stands() {
    let (old, new) = (udp(&[VIP], &["10.0.0.1:53"]), udp(&[VIP], &["10.0.0.2:53"]));
    for leaving_first in [true, false] {
        let mut dirty = DirtyFrontends::default();
        if leaving_first {
            dirty.change(Some(&old), None);
        }
        dirty.change(None, Some(&new));
        if !leaving_first {
            dirty.change(Some(&old), None);
        }
        assert_eq!(judge(&dirty, VIP, "10.0.0.1:53"), FlowState::Stale);
        assert_eq!(judge(&dirty, VIP, "10.0.0.2:53"), FlowState::Kept);
    }
}

#[test]
fn later_work_wins_and_suspicion_stays() {
    let (none, one) = (udp(&[VIP], &[]), udp(&[VIP], &["10.0.0.1:53"]));
    let two = udp(&[VIP], &["10.0.0.1:53", "10.0.0.2:53"]);
    let mut dirty = changed(Some(&none), Some(&one));
    dirty.merge(changed(Some(&one), Some(&two)));
    assert_eq!(dirty.to_sweep().count(), 1);
    assert_eq!(judge(&dirty, VIP, "10.0.0.2:53"), FlowState::Kept);
    dirty.merge(changed(Some(&two), None));
    assert_eq!(judge(&dirty, VIP, "10.0.0.2:53"), FlowState::Stale);
    dirty.merge(DirtyFrontends::default());
    assert_eq!(
        judge(&dirty, "192.168.10.1:53", VIP),
        FlowState::Unconcerned
    );
}

/// The change from one plan of a service to another.
fn changes(old: Option<&ServicePlan>, new: Option<&ServicePlan>) -> Arc<ServiceChanges> {
    let plan = |plan: Option<&ServicePlan>| plan.cloned().map(Arc::new);
    Arc::new(ServiceChanges {
        replaced: vec![Replaced {
            service: ObjectName::new("shop", "dns"),
            old: plan(old),
            new: plan(new),
            adopted: false,
            health_check: None,
        }],
        node_ports: Some(["192.168.10.0/24".parse().unwrap()].into()),
        ..ServiceChanges::default()
    })
}

#[test]
fn changes_that_wait_are_merged() {
    let (sender, receiver) = channel();
    let mut pending = Pending::new(receiver);
    let (none, one) = (udp(&[VIP], &[]), udp(&[VIP], &["10.0.0.1:53"]));
    assert_eq!(pending.receive(Some(Duration::ZERO)), Received::Timeout);
    sender.send(changes(None, Some(&none))).unwrap();
    sender.send(changes(Some(&none), Some(&one))).unwrap();
    assert!(pending.keeps(&flow(VIP, "10.0.0.1:53"), &HashSet::new()));
    assert!(!pending.keeps(&flow(VIP, "10.0.0.2:53"), &HashSet::new()));
    drop(sender);
    let mut both = changed(None, Some(&none));
    both.merge(changed(Some(&none), Some(&one)));
    assert_eq!(pending.receive(None), Received::Dirty(both));
    assert_eq!(pending.receive(None), Received::Closed);
}

#[test]
fn a_frontend_that_is_deleted_before_its_last_change_was_handled_is_swept() {
    let (one, two) = (
        udp(&[VIP], &["10.0.0.1:53"]),
        udp(&[VIP], &["10.0.0.1:53", "10.0.0.2:53"]),
    );
    // In two changes, and in one that took effect late.
    for together in [false, true] {
        let (sender, receiver) = channel();
        let mut pending = Pending::new(receiver);
        sender.send(changes(None, Some(&one))).unwrap();
        pending.take().unwrap();
        let (more, gone) = (changes(Some(&one), Some(&two)), changes(Some(&two), None));
        if together {
            let mut both = ServiceChanges::clone(&more);
            both.append(ServiceChanges::clone(&gone));
            sender.send(Arc::new(both)).unwrap();
        } else {
            sender.send(more).unwrap();
            sender.send(gone).unwrap();
        }
        let dirty = pending.take().unwrap();
        assert_eq!(dirty.to_sweep().count(), 1, "{together}");
        assert_eq!(judge(&dirty, VIP, "10.0.0.1:53"), FlowState::Stale);
    }
}

#[test]
fn node_ports_are_suspect_when_they_answer_elsewhere_and_all_when_the_tables_were_rewritten() {
    let (sender, receiver) = channel();
    let mut pending = Pending::new(receiver);
    let plan = udp(&[VIP, "node:30053"], &["10.0.0.1:53"]);
    sender.send(changes(None, Some(&plan))).unwrap();
    assert_eq!(pending.take().unwrap().to_sweep().count(), 2);
    let others = ServiceChanges {
        node_ports: Some(Arc::default()),
        ..ServiceChanges::default()
    };
    sender.send(Arc::new(others)).unwrap();
    let suspects: Vec<UdpFrontend> = pending.take().unwrap().to_sweep().collect();
    assert_eq!(suspects, [UdpFrontend::NodePort(Family::V4, 30053)]);
    let rewritten = ServiceChanges {
        rewritten: true,
        ..ServiceChanges::default()
    };
    sender.send(Arc::new(rewritten)).unwrap();
    assert_eq!(pending.take().unwrap().to_sweep().count(), 2);
}

#[test]
fn few_frontends_are_listed_by_themselves_and_many_together() {
    let front = |n: u16| UdpFrontend::Address(SocketAddr::new([10, 96, 0, 1].into(), n));
    let of = |fronts: &[UdpFrontend]| filters(Family::V4, fronts.iter());
    let v4 = nft::TableFamily::Ip;
    assert!(of(&[]).is_empty());
    assert_eq!(
        of(&[UdpFrontend::Address(at(VIP))]),
        [FlowFilter::to(at(VIP))]
    );
    assert_eq!(
        of(&[front(53), UdpFrontend::Address(at(VIP))]),
        [FlowFilter::to_port(v4, 53)]
    );
    assert_eq!(
        of(&[UdpFrontend::NodePort(Family::V4, 30053)]),
        [FlowFilter::to_port(v4, 30053)]
    );
    let many: Vec<UdpFrontend> = (1..100).map(front).collect();
    assert_eq!(of(&many), [FlowFilter::all(v4)]);
}

/// A table of flows in memory, shared by its clones.
#[derive(Clone, Default)]
struct Fake(Rc<RefCell<Table>>);

#[derive(Default)]
struct Table {
    flows: Vec<Flow>,
    sweeps: usize,
    broken: bool,
}

impl Tracker for Fake {
    fn sweep(
        &mut self,
        filter: &FlowFilter,
        stale: &mut dyn FnMut(&Flow) -> bool,
    ) -> Result<usize, ConntrackError> {
        let mut table = self.0.borrow_mut();
        table.sweeps += 1;
        if table.broken {
            return Err(ConntrackError::Netlink(Error::Interrupted {
                what: "the UDP flows",
                times: 1,
            }));
        }
        let before = table.flows.len();
        table.flows.retain(|f| !(filter.admits(f) && stale(f)));
        Ok(before - table.flows.len())
    }

    fn own_addresses(&mut self) -> Vec<IpAddr> {
        vec!["192.168.10.1".parse().unwrap()]
    }
}

thread_local! {
    static TABLE: Fake = Fake::default();
}

#[derive(Default)]
struct RecordedReports(Mutex<Vec<String>>);

impl Reporter for RecordedReports {
    fn notice(&self, _: &Notice) {}

    fn failed(&self, error: &Error) {
        panic!("rules are not concerned: {error}");
    }

    fn stale_flows_remain(&self, error: &ConntrackError) {
        self.0.lock().unwrap().push(error.to_string());
    }
}

#[test]
fn the_cleaner_deletes_counts_and_outlives_failures() {
    let table = TABLE.with(Clone::clone);
    let (stale, kept) = (flow(VIP, "10.0.0.1:53"), flow(VIP, "10.0.0.2:53"));
    let other = flow("10.96.0.11:53", "10.0.0.1:53");
    table.0.borrow_mut().flows = vec![stale, kept, other];
    table.0.borrow_mut().broken = true;
    let (registry, heard) = (Registry::new().unwrap(), RecordedReports::default());
    let metrics = FollowerMetrics::register(&registry).unwrap();
    let (sender, receiver) = channel();
    let pending = Pending::new(receiver);
    let open = || Ok(TABLE.with(Clone::clone));
    let mut cleaner = Cleaner::new(open, pending, &metrics, &heard);
    let dirty = changed(None, Some(&udp(&[VIP], &["10.0.0.2:53"])));
    cleaner.clean(dirty.clone());
    cleaner.clean(dirty.clone());
    assert_eq!(heard.0.lock().unwrap().len(), 1, "reported once");
    assert_eq!(table.0.borrow().flows.len(), 3);
    table.0.borrow_mut().broken = false;
    // What failed is tried again with the next work, here by the loop itself.
    let another = udp(&["10.96.0.12:53"], &[]);
    sender.send(changes(None, Some(&another))).unwrap();
    drop(sender);
    cleaner.run();
    assert_eq!(table.0.borrow().flows, [kept, other]);
    let page = registry.encode();
    for line in [
        "kubeproxy_conntrack_reconciler_deleted_entries_total{ip_family=\"IPv4\"} 1",
        "kubeproxy_conntrack_reconciler_deleted_entries_total{ip_family=\"IPv6\"} 0",
        "kubeproxy_conntrack_reconciler_sync_duration_seconds_count{ip_family=\"IPv4\"} 1",
    ] {
        assert!(page.contains(line), "{line}\n{page}");
    }
}

#[test]
fn endpoints_that_come_while_the_cleaner_works_keep_their_flows() {
    let table = TABLE.with(Clone::clone);
    let fresh = flow(VIP, "10.0.0.2:53");
    table.0.borrow_mut().flows = vec![fresh];
    let (registry, heard) = (Registry::new().unwrap(), RecordedReports::default());
    let metrics = FollowerMetrics::register(&registry).unwrap();
    let (sender, receiver) = channel();
    let pending = Pending::new(receiver);
    let mut cleaner = Cleaner::new(|| Ok(TABLE.with(Clone::clone)), pending, &metrics, &heard);
    let one = udp(&[VIP], &["10.0.0.1:53"]);
    let two = udp(&[VIP], &["10.0.0.1:53", "10.0.0.2:53"]);
    sender.send(changes(Some(&one), Some(&two))).unwrap();
    cleaner.clean(changed(None, Some(&one)));
    assert_eq!(table.0.borrow().flows, [fresh]);
    // More endpoints alone are no reason to list anything.
    let sweeps = table.0.borrow().sweeps;
    drop(sender);
    cleaner.run();
    assert_eq!(table.0.borrow().sweeps, sweeps);
}
