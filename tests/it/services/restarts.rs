//! Packets while endpoints change and nftlet restarts.

use std::io::ErrorKind;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use super::packets::{CIDR, DROPPED, Shop, asks, ip, pod_addresses, serve, shop};
use nftlet_lab::netns::{
    Ask, Client, Lab, LabOptions, Namespace, PATIENCE, loses_nothing, require_net_admin, wait_for,
};

/// Between two requests of a client that goes on asking. Without it all ports of an address are
/// used within seconds, while the server keeps each for a minute after it closed the connection.
const PACE: Duration = Duration::from_millis(1);

/// Clients that ask over and over again until they are stopped.
struct Load {
    from: Namespace,
    /// How many connection requests had been repeated before.
    repeated: u64,
    stop: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<(u64, Vec<String>)>>,
    done: Arc<AtomicU64>,
}

impl Load {
    fn start(from: &Namespace, asks: Vec<Ask>, pace: Duration) -> Self {
        let (stop, done) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let threads = asks.into_iter().map(|ask| {
            let (ns, stop, done) = (from.clone(), stop.clone(), done.clone());
            thread::spawn(move || {
                let client = Client::new(&ns);
                let (mut answered, mut failed) = (0, Vec::new());
                while !stop.load(Ordering::Relaxed) {
                    match client.ask(ask) {
                        Ok(_) => answered += 1,
                        Err(error) => failed.push(format!("{ask:?}: {error}")),
                    }
                    done.fetch_add(1, Ordering::Relaxed);
                    thread::sleep(pace);
                }
                (answered, failed)
            })
        });
        let repeated = from.repeated_requests();
        let threads = threads.collect();
        Self {
            from: from.clone(),
            repeated,
            stop,
            threads,
            done,
        }
    }

    /// Waits until this many more requests are done.
    fn more(&self, requests: u64) {
        let until = self.done.load(Ordering::Relaxed) + requests;
        wait_for("requests", PATIENCE, || {
            (self.done.load(Ordering::Relaxed) >= until).then_some(())
        });
    }

    /// The number of answers, and of requests that were lost and repeated; panics if one failed.
    #[track_caller]
    fn finish(self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        let mut total = 0;
        for thread in self.threads {
            let (answered, failed) = thread.join().expect("a client thread ends");
            assert!(
                failed.is_empty(),
                "{} of {} requests failed, first {}",
                failed.len(),
                answered + failed.len() as u64,
                failed[0]
            );
            total += answered;
        }
        (total, self.from.repeated_requests() - self.repeated)
    }
}

#[test]
fn a_restart_interrupts_nothing() {
    if require_net_admin() {
        loses_nothing(restart);
    }
}

/// Restarts and crashes under load; how many requests were lost.
fn restart() -> u64 {
    let shop = Shop::open(&CIDR);
    let asks = ["10.96.0.10", "2001:db8:1::10"]
        .into_iter()
        .flat_map(|address| asks(ip(address), 80, 53));
    let load = Load::start(&shop.lab.client().ns, asks.collect(), PACE);
    for _ in 0..3 {
        let mut daemon = shop.manifests.run(shop.node(), &CIDR);
        load.more(200);
        let status = daemon.stop(PATIENCE);
        assert!(
            status.is_some_and(|s| s.success()),
            "{status:?} {}",
            daemon.log()
        );
        load.more(200);
        let mut crashed = shop.manifests.run(shop.node(), &CIDR);
        load.more(200);
        crashed.kill();
        load.more(200);
    }
    load.finish().1
}

#[test]
fn changes_of_the_files_arrive_at_once() {
    if !require_net_admin() {
        return;
    }
    let service = shop();
    let shop = Shop::open(&CIDR);
    let daemon = shop.manifests.run(shop.node(), &CIDR);
    let client = Client::new(&shop.lab.client().ns);
    let ask = Ask::tcp(ip("10.96.0.10"), 80);
    let pods = shop.lab.pods();
    for pod in &pods {
        let only = pod_addresses(&[pod]);
        shop.manifests.endpoints(&service, 8080, &only);
        wait_for("only one pod answers", PATIENCE, || {
            let answers: Vec<_> = (0..20).map(|_| client.ask(ask).unwrap().name).collect();
            answers.iter().all(|name| *name == pod.name).then_some(())
        });
    }
    shop.manifests.remove("Service", "web");
    wait_for("the service is removed", PATIENCE, || {
        let rules = shop
            .node()
            .nft(&["list", "map", "ip", "nftlet", "frontends"]);
        (!rules.contains("10.96.0.10")).then_some(())
    });
    let error = client
        .ask(ask.timeout(DROPPED))
        .expect_err("it was removed");
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    // Broken input changes nothing and is named.
    shop.manifests.service(&service);
    wait_for("the service is back", PATIENCE, || {
        client.ask(ask.timeout(DROPPED)).ok()
    });
    let broken = shop.manifests.path().join("service-web.json");
    std::fs::write(&broken, "{\"apiVersion\": \"v1\",\n \"kind\": }").unwrap();
    wait_for("the broken file is named", PATIENCE, || {
        daemon.log().contains("service-web.json:2:").then_some(())
    });
    assert!(client.ask(ask).is_ok());
}

mod churn {
    //! Endpoints come and go as fast as the kernel takes it, while clients connect.

    use super::*;
    use nftlet::model::{
        Delivery, Endpoint, EndpointSlice, Event, Family, Kind, Object, ObjectName, ServiceKind,
        ServicePort, SlicePort, TrafficPolicy,
    };
    use nftlet::netlink::Nftables;
    use nftlet::serve::metrics::Registry;
    use nftlet::services::ServiceSettings;
    use nftlet::sync::{Controller, Log, Outcome, SyncMetrics};

    use crate::support::clock;

    fn slice(pods: &[IpAddr]) -> Event {
        let endpoints = pods.iter().map(|address| Endpoint {
            address: *address,
            ready: true,
            serving: true,
            terminating: false,
            node: None,
            hints: None,
        });
        Event::Apply(Object::EndpointSlice(EndpointSlice {
            name: ObjectName::new("shop", "web-1"),
            service: ObjectName::new("shop", "web"),
            created: None,
            family: Family::V4,
            ports: vec![SlicePort {
                name: "http".into(),
                protocol: nftlet::model::Protocol::Tcp,
                port: 8080,
            }],
            endpoints: endpoints.collect(),
            triggered_at_ms: None,
        }))
    }

    fn service() -> Event {
        Event::Apply(Object::Service(nftlet::model::Service {
            name: ObjectName::new("shop", "web"),
            created: None,
            kind: ServiceKind::ClusterIp,
            cluster_ips: vec![ip("10.96.0.10")],
            ports: vec![ServicePort {
                name: "http".into(),
                protocol: nftlet::model::Protocol::Tcp,
                port: 80,
                node_port: None,
            }],
            external_ips: vec![],
            load_balancer_ips: vec![],
            source_ranges: vec![],
            external_policy: TrafficPolicy::Cluster,
            internal_policy: TrafficPolicy::Cluster,
            affinity_seconds: None,
            health_check_node_port: None,
        }))
    }

    /// A packet may meet the rules of one transaction and the elements of the next. Every number
    /// of endpoints from one to three follows every other; all pods stay alive, so that a failed
    /// request can only be a packet that fell between two transactions. Removing unused chains
    /// makes each change bring its chain anew.
    #[test]
    fn no_request_fails_while_endpoints_come_and_go() {
        if require_net_admin() {
            loses_nothing(come_and_go);
        }
    }

    /// How many requests were lost.
    fn come_and_go() -> u64 {
        let lab = Lab::new(LabOptions::default());
        let _servers = serve(&lab.pods());
        let pods: Vec<IpAddr> = lab.pods().iter().map(|pod| pod.v4.into()).collect();
        let metrics = SyncMetrics::register(&Registry::new().unwrap()).unwrap();
        let nftables = lab.node().ns().run(|| Nftables::open().unwrap());
        let mut controller = Controller::new(nftables, ServiceSettings::default(), &metrics, &Log);
        let mut first: Vec<_> = Kind::ALL.map(Event::ListStarted).into();
        first.extend([service(), slice(&pods)]);
        first.extend(Kind::ALL.map(Event::ListComplete));
        let runtime = clock::paused();
        let _entered = runtime.enter();
        let mut handle = |events: Vec<Event>| {
            let outcome = controller.handle(events.into_iter().map(Delivery::now));
            assert_eq!(outcome, Outcome::Synced);
            clock::remove_unused_chains(&runtime, &mut controller);
        };
        handle(first);
        let ask = Ask::tcp(ip("10.96.0.10"), 80);
        // As many as there can be, and in all not so many that a port is used twice.
        let load = Load::start(&lab.client().ns, vec![ask; 4], Duration::ZERO);
        let orders: [&[usize]; 6] = [&[0], &[0, 1, 2], &[1, 2], &[2], &[2, 0], &[0, 1, 2]];
        let mut changes = 0u32;
        while load.done.load(Ordering::Relaxed) < 12_000 || changes <= 500 {
            for order in orders {
                let chosen: Vec<_> = order.iter().map(|index| pods[*index]).collect();
                handle(vec![slice(&chosen)]);
                changes += 1;
            }
        }
        let (answered, lost) = load.finish();
        assert!(answered >= 12_000, "{answered} answers, {changes} changes");
        lost
    }
}
