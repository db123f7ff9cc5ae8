//! Audits find what no notification reported.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::support::manifests::Manifests;
use crate::support::objects::{deny_all, list, namespace, pod, service, slice};
use nftlet::model::{Delivery, Event, Object};
use nftlet::netlink::Nftables;
use nftlet::policies::{self, Engine};
use nftlet::serve::health::Health;
use nftlet::serve::metrics::Registry;
use nftlet::services::ServiceSettings;
use nftlet::source;
use nftlet::sync::{Audits, Controller, Log, Signals, SyncMetrics, run};
use nftlet_lab::netns::{Namespace, require_net_admin, wait_for};
use tokio::sync::{Notify, mpsc, oneshot, watch};

const LONG: Duration = nftlet_lab::netns::PATIENCE;

/// A service with one endpoint, and a policy for its pod.
fn shop() -> Manifests {
    let manifests = Manifests::new();
    manifests.put(&list(
        "all",
        &[
            service("web", "10.96.0.10"),
            slice("web", "web", &["10.244.1.1"]),
            namespace("shop", &[]),
            pod("web", "node-1", &[], &["10.244.1.1"]),
            deny_all("closed"),
        ],
    ));
    manifests
}

/// The ruleset as others list it, sorted because the kernel lists tables by age.
fn listing(node: &Namespace) -> Vec<String> {
    let listed = node.nft(&["list", "ruleset"]);
    let mut lines: Vec<_> = listed.lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

/// Ends a thread also where a wait is in vain.
struct Stop<F: Fn()>(F);

impl<F: Fn()> Drop for Stop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// Without a monitor: it is known only that notifications were missed, and audits find the changes, in
/// both tables of both families, also while changes of services go on.
#[test]
fn an_audit_finds_what_no_notification_reported() {
    if !require_net_admin() {
        return;
    }
    let namespace = Namespace::new("audit");
    let registry = Registry::new().expect("different names");
    let metrics = SyncMetrics::register(&registry).expect("different names");
    let (events, received) = mpsc::channel(64);
    let (stop, stopped) = watch::channel(false);
    let (ready, in_force) = oneshot::channel();
    let missed = Arc::new(Notify::new());
    let manifests = shop();
    let paths = vec![manifests.path().to_owned()];
    let mut source = source::Manifests::new(paths, "node-1".into()).with_network_policies(true);
    let objects = source.load().expect("they can be read");
    let slice = |last: u8| {
        let slices = objects.iter().find_map(|event| match event {
            Event::Apply(Object::EndpointSlice(slice)) => Some(slice.clone()),
            _ => None,
        });
        let mut slice = slices.expect("one");
        slice.endpoints[0].address = [10, 244, 1, last].into();
        Event::Apply(Object::EndpointSlice(slice))
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            namespace.enter();
            let kernel = Nftables::open().expect("a socket");
            let audited = Nftables::open().expect("a socket");
            let settings = policies::PolicySettings {
                node: "node-1".into(),
                ..policies::PolicySettings::default()
            };
            let mut controller =
                Controller::new(kernel, ServiceSettings::default(), &metrics, &Log)
                    .with_policies(Engine::new(settings));
            let signals = Signals {
                stop: stopped,
                once: false,
                foreign: Arc::default(),
                missed: missed.clone(),
                audits: Some(Audits::start(audited).expect("a thread")),
                ready: vec![ready],
                queries: None,
            };
            let runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = { runtime }.enable_time().build().expect("a runtime");
            let health = Health::new(LONG);
            runtime.block_on(run(&mut controller, received, signals, &health));
        });
        let _stop = Stop(|| {
            stop.send_replace(true);
        });
        let send = |event: Event| {
            let delivery = Delivery::now(event);
            events.blocking_send(delivery).expect("it runs");
        };
        objects.iter().cloned().for_each(send);
        in_force.blocking_recv().expect("it runs");
        let counted = |series: &str| {
            let text = registry.encode();
            let mut lines = text.lines();
            let count = lines.find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
            count.map_or(0, |count| count.parse::<u64>().expect("a number"))
        };
        let audits = |result: &str| counted(&format!("nftlet_audits_total{{result=\"{result}\"}}"));
        missed.notify_one();
        wait_for("an audit", LONG, || (audits("same") == 1).then_some(()));
        // Now the tables are read.
        namespace.nft_load("table ip other { }");
        missed.notify_one();
        wait_for("an audit", LONG, || (audits("same") == 2).then_some(()));
        namespace.nft_load("delete table ip other");
        missed.notify_one();
        wait_for("an audit", LONG, || (audits("same") == 3).then_some(()));
        assert_eq!(audits("different"), 0);
        let text = registry.encode();
        assert!(
            text.contains("\nnftlet_foreign_changes_healed_total 0\n"),
            "{text}"
        );
        let wanted = listing(&namespace);
        assert!(
            wanted
                .iter()
                .any(|line| line.contains("table ip6 nftlet-policy"))
        );
        for change in [
            "flush ruleset",
            "delete table ip nftlet",
            "flush chain ip6 nftlet services",
            "add element ip nftlet frontends { 10.96.0.99 . tcp . 80 : 9:0 }",
            "flush chain ip nftlet-policy ingress",
            "delete table ip6 nftlet-policy",
        ] {
            let found = audits("different");
            namespace.nft_load(change);
            missed.notify_one();
            wait_for(change, LONG, || {
                (listing(&namespace) == wanted).then_some(())
            });
            wait_for("the verdict", LONG, || {
                (audits("different") > found).then_some(())
            });
        }
        // While the controller writes all the time.
        let healed = AtomicBool::new(false);
        thread::scope(|inner| {
            let _healed = Stop(|| healed.store(true, Ordering::Relaxed));
            inner.spawn(|| {
                for last in (1..=2).cycle() {
                    // The next change when this one is written, so that none waits in the queue.
                    let written = counted("nftlet_transactions_total");
                    send(slice(last));
                    while counted("nftlet_transactions_total") == written {
                        if healed.load(Ordering::Relaxed) {
                            send(slice(1));
                            return;
                        }
                        thread::yield_now();
                    }
                }
            });
            namespace.nft_load("flush chain ip nftlet services");
            missed.notify_one();
            let chain = || namespace.nft(&["list", "chain", "ip", "nftlet", "services"]);
            wait_for("the chain", LONG, || chain().contains("vmap").then_some(()));
        });
        wait_for("the end", LONG, || {
            (listing(&namespace) == wanted).then_some(())
        });
    });
}
