//! The service of another namespace, and how long its changes take meanwhile.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::MutexGuard;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::objects::{self, cidr, service, slice_of, with};
use serde_json::{Value, json};

use crate::support::agent::Node;
use crate::timed::alone;
use nftlet_lab::fake_api::{CIDRS, NODES, SERVICES, SLICES};
use nftlet_lab::netns::{Ask, PATIENCE, Protocol, Server, require_net_admin};

/// The time in which a change is in force. Without optimisation nftlet takes several times as long.
pub const PROMISED: Duration = if cfg!(debug_assertions) {
    Duration::from_millis(500)
} else {
    Duration::from_millis(100)
};
/// The changes that one attempt measures at least.
const CHANGES: usize = 20;
/// The attempts before the promise counts as broken. Other load of the machine only lengthens a
/// measurement.
const ATTEMPTS: usize = 5;

/// How long a request waits before the next one.
const AGAIN: Duration = Duration::from_millis(10);

/// The ClusterIP of the service.
pub const CLUSTER_IP: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 200, 1));
/// The NodePort of the service.
pub const NODE_PORT: u16 = 30_200;
/// The address of the node, at which the service's pod listens on port 8080.
pub const NODE_IP: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 168, 10, 1));
/// The name with which the pod of the service answers.
pub const POD: &str = "neighbours-pod";

/// The service `neighbour/web` on a node with an API server.
pub struct Neighbour {
    pub node: Node,
    _pod: Server,
    _turn: MutexGuard<'static, ()>,
}

impl Neighbour {
    /// Sets up the node, its ServiceCIDR, and the service with its pod. `None` where network
    /// namespaces cannot be created.
    #[track_caller]
    pub fn new() -> Option<Self> {
        let turn = alone();
        if !require_net_admin() {
            return None;
        }
        let node = Node::new();
        node.ns.addr_add("lo", &format!("{NODE_IP}/32"));
        node.ns
            .route_add("10.96.0.0/16", &format!("dev lo src {NODE_IP}"));
        let pod = Server::start(&node.ns, Protocol::Tcp, SocketAddr::new(NODE_IP, 8080), POD);
        node.api.put(
            NODES,
            with(
                objects::node("node-1", "zone-a"),
                json!({"spec": {"podCIDRs": ["10.244.1.0/24"]},
                    "status": {"addresses": [{"type": "InternalIP", "address": NODE_IP}]}}),
            ),
        );
        node.api.put(CIDRS, cidr("kubernetes", "10.96.0.0/16"));
        node.api.put(
            SERVICES,
            with(
                service("neighbour/web", CLUSTER_IP),
                json!({"spec": {"type": "NodePort", "ports": [
                    {"name": "http", "port": 80, "protocol": "TCP", "nodePort": NODE_PORT},
                ]}}),
            ),
        );
        let neighbour = Self {
            node,
            _pod: pod,
            _turn: turn,
        };
        neighbour.set_endpoint(true);
        Some(neighbour)
    }

    /// Gives the service its endpoint, or takes it away.
    fn set_endpoint(&self, present: bool) {
        let endpoints = if present {
            json!([{"addresses": [NODE_IP], "nodeName": "node-1"}])
        } else {
            json!([])
        };
        self.node
            .api
            .put(SLICES, slice("neighbour", "web", &endpoints));
    }

    /// Asks the service at its ClusterIP: whether it has an endpoint. `None` where that cannot be
    /// told: a request that meets the change on its way is dropped, so that its client asks again.
    /// The kernel would do so after a second; here it happens at once.
    ///
    /// # Panics
    ///
    /// Panics if anyone but the service's pod answers.
    #[track_caller]
    pub fn ask(&self) -> Option<bool> {
        let ask = Ask::tcp(CLUSTER_IP, 80).timeout(AGAIN);
        match self.node.ns.run(|| ask.send()) {
            Ok(answer) => {
                assert_eq!(answer.name, POD, "another pod answers for the neighbour");
                Some(true)
            }
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => Some(false),
            Err(error) if error.kind() == ErrorKind::TimedOut => None,
            Err(error) => panic!("the neighbour's service does not answer: {error}"),
        }
    }

    /// Waits until the service answers.
    #[track_caller]
    pub fn is_served(&self) {
        self.becomes(true);
    }

    /// Takes the endpoint of the service away and gives it back. Returns the longer of the two
    /// times from the write to the API server until it is in force.
    #[track_caller]
    pub fn change(&self) -> Duration {
        let times = [false, true].map(|present| {
            let started = Instant::now();
            self.set_endpoint(present);
            self.becomes(present);
            started.elapsed()
        });
        times.into_iter().max().unwrap_or_default()
    }

    #[track_caller]
    fn becomes(&self, served: bool) {
        let deadline = Instant::now() + PATIENCE;
        while self.ask() != Some(served) {
            assert!(
                Instant::now() < deadline,
                "the neighbour's endpoint should be in force: {served}"
            );
        }
    }

    /// Calls a closure again and again, with the number of the call, and changes the service
    /// meanwhile. In each attempt, so many calls begin and end.
    ///
    /// # Panics
    ///
    /// Panics if some change was not in force in time in each attempt.
    #[track_caller]
    pub fn changes_in_time_while(&self, calls: usize, attack: impl Fn(usize) + Sync) {
        self.is_served();
        let (over, ended) = (AtomicBool::new(false), AtomicUsize::new(0));
        let worst = thread::scope(|scope| {
            let _end = SetOnDrop(&over);
            let attacker = scope.spawn(|| {
                let numbers = (0..).take_while(|_| !over.load(Ordering::Relaxed));
                for number in numbers {
                    attack(number);
                    ended.fetch_add(1, Ordering::Relaxed);
                }
            });
            let mut worst = Vec::new();
            for _ in 0..ATTEMPTS {
                let (mut longest, mut changes) = (Duration::ZERO, 0);
                // The call goes on that began before.
                let enough = ended.load(Ordering::Relaxed) + calls + 1;
                while changes < CHANGES
                    || (ended.load(Ordering::Relaxed) < enough && !attacker.is_finished())
                {
                    longest = longest.max(self.change());
                    changes += 1;
                }
                worst.push(longest);
                if longest <= PROMISED {
                    break;
                }
            }
            worst
        });
        eprintln!("the longest change of each attempt: {worst:?}");
        assert!(
            worst.last().is_some_and(|longest| *longest <= PROMISED),
            "a change of the neighbour should be in force within {PROMISED:?}: {worst:?}"
        );
    }
}

/// Ends the attack also where the neighbour's part panics.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// An EndpointSlice with the port 8080 named `http`.
pub fn slice(namespace: &str, service: &str, endpoints: &Value) -> Value {
    let name = format!("{namespace}/{service}-1");
    slice_of(&name, service, endpoints.clone())
}

#[test]
fn changes_are_in_force_in_time_without_an_attack() {
    let Some(neighbour) = Neighbour::new() else {
        return;
    };
    let _agent = neighbour.node.run();
    neighbour.changes_in_time_while(1, |_| thread::yield_now());
}
