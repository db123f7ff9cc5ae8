//! A node with three pods in two namespaces, for tests of network policies.

use serde_json::{Value, json};

use crate::support::manifests::{CLUSTER_CIDR, Manifests};
use crate::support::objects::{self, namespace, with};
use crate::support::reach::allow_ping;
use nftlet_lab::netns::{Lab, LabOptions, Machine, Namespace, Protocol, Server};

/// The ports that everyone serves, over TCP and UDP.
pub const SERVED: [u16; 2] = [80, 8080];

/// `shop/web`, `shop/db` and `store/api` are the pods of node-1, with the label `app` each; the
/// namespaces have the label `team`, `a` and `b`. All serve TCP and UDP at [`SERVED`], of which
/// 8080 is called `http`, and so do nodes and clients.
pub struct Shop {
    pub lab: Lab,
    pub manifests: Manifests,
    _servers: Vec<Server>,
}

impl Shop {
    /// One node and one client.
    pub fn open() -> Self {
        Self::with(LabOptions::default())
    }

    /// Pods of further nodes are not described by manifests.
    pub fn with(options: LabOptions) -> Self {
        let lab = Lab::new(options);
        let manifests = Manifests::new();
        manifests.put(&namespace("shop", &[("team", "a")]));
        manifests.put(&namespace("store", &[("team", "b")]));
        let shop = Self {
            _servers: serve(&machines(&lab)),
            lab,
            manifests,
        };
        let [web, db, api] = shop.pods();
        let pods = [
            ("shop", "web", &web),
            ("shop", "db", &db),
            ("store", "api", &api),
        ];
        for (namespace, name, machine) in pods {
            let object = pod(namespace, name, &[("app", name)], machine);
            shop.manifests.put(&object);
        }
        shop
    }

    /// web, db and api.
    pub fn pods(&self) -> [Machine; 3] {
        let pods = &self.lab.node().pods;
        [0, 1, 2].map(|index| pods[index].clone())
    }

    /// The first node.
    pub fn node(&self) -> &Namespace {
        self.lab.node().ns()
    }

    /// Programs the node with the current manifests, and returns what nftlet printed.
    #[track_caller]
    pub fn apply(&self) -> String {
        self.manifests
            .program(self.node(), &["--cluster-cidr", CLUSTER_CIDR])
    }

    /// Writes an object and programs the node.
    #[track_caller]
    pub fn put_and_apply(&self, object: &Value) {
        self.manifests.put(object);
        self.apply();
    }

    /// The rules of the node.
    #[track_caller]
    pub fn rules(&self) -> String {
        self.node().nft(&["list", "ruleset"])
    }
}

fn machines(lab: &Lab) -> Vec<&Machine> {
    let nodes = lab.nodes.iter().map(|node| &node.machine);
    nodes
        .chain(lab.node().pods.iter())
        .chain(&lab.clients)
        .collect()
}

/// Serves [`SERVED`] on all these machines, and lets them ping.
pub fn serve(machines: &[&Machine]) -> Vec<Server> {
    let mut servers = Vec::new();
    for machine in machines {
        allow_ping(machine);
        for port in SERVED {
            servers.extend(machine.serve(Protocol::Tcp, port));
            servers.extend(machine.serve(Protocol::Udp, port));
        }
    }
    servers
}

/// A running Pod of node-1 with the addresses of a machine.
pub fn pod(namespace: &str, name: &str, labels: &[(&str, &str)], at: &Machine) -> Value {
    let name = format!("{namespace}/{name}");
    with(
        objects::pod(&name, "node-1", labels, &at.addresses()),
        json!({
            "metadata": {"creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"containers": [
                {"name": "main", "ports": [{"name": "http", "containerPort": 8080}]},
            ]},
        }),
    )
}

/// The same with a container that runs since a second of the year 2026.
pub fn running_since(second: u8, mut pod: Value) -> Value {
    let at = format!("2026-01-01T00:00:{second:02}Z");
    let state = json!({"running": {"startedAt": at}});
    pod["status"]["containerStatuses"] = json!([{"name": "main", "state": state}]);
    pod
}
