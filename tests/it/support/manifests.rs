//! Manifests for tests: a directory of objects, and nftlet run on it.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::objects::merge;
use nftlet_lab::netns::{Daemon, Namespace, PATIENCE, wait_for};

/// The pod network of the harness, as `--cluster-cidr` wants it.
pub const CLUSTER_CIDR: &str = "10.244.0.0/16,fd00:10:244::/48";

/// A directory with a file per object.
pub struct Manifests(TempDir);

impl Manifests {
    /// A directory with the node `node-1` and the service ranges.
    pub fn new() -> Self {
        let manifests = Self(tempfile::tempdir().expect("a temporary directory"));
        manifests.node(&Value::Null);
        manifests.put(&json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR",
            "metadata": {"name": "kubernetes"},
            "spec": {"cidrs": ["10.96.0.0/16", "fd00:10:96::/112"]},
        }));
        manifests
    }

    /// Writes the node `node-1`, changed by a merge patch (null leaves it unchanged).
    pub fn node(&self, patch: &Value) {
        let mut node = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": "node-1"},
            "spec": {"podCIDRs": ["10.244.1.0/24", "fd00:10:244:1::/64"]},
            "status": {"addresses": [
                {"type": "InternalIP", "address": "192.168.10.1"},
                {"type": "InternalIP", "address": "fd00:192:168:10::1"},
            ]},
        });
        merge(&mut node, patch);
        self.put(&node);
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    fn file(&self, kind: &str, name: &str) -> std::path::PathBuf {
        self.path()
            .join(format!("{kind}-{name}.json").to_lowercase())
    }

    /// Writes an object as editors and config maps do: beside, then renamed into place.
    pub fn put(&self, object: &Value) {
        let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str);
        let kind = text("/kind").expect("a kind");
        let name = text("/metadata/name").expect("a name");
        let (file, draft) = (self.file(kind, name), self.path().join("next.draft"));
        std::fs::write(&draft, object.to_string()).expect("a manifest is written");
        std::fs::rename(&draft, file).expect("a manifest is renamed");
    }

    /// Removes an object.
    pub fn remove(&self, kind: &str, name: &str) {
        std::fs::remove_file(self.file(kind, name)).expect("a manifest is removed");
    }

    /// Writes a service.
    pub fn service(&self, service: &Service) {
        self.put(&service.object());
    }

    /// Writes the endpoints of a service, a slice a family: (address, ready) each, all on
    /// `node-1`, with the same target port under each port name.
    pub fn endpoints(&self, service: &Service, target: u16, addresses: &[(String, bool)]) {
        let backends = addresses.iter().map(|(address, ready)| {
            Backend::new(address, "node-1").patch(json!({"conditions": {"ready": ready}}))
        });
        self.backends(service, target, &backends.collect::<Vec<_>>());
    }

    /// Writes the endpoints of a service, a slice a family, with the same target port under each
    /// port name.
    pub fn backends(&self, service: &Service, target: u16, backends: &[Backend]) {
        self.backends_named(service, &service.name, target, backends);
    }

    /// The same in slices whose names begin with another name than the service's: a service whose
    /// ports differ in their targets has several.
    pub fn backends_named(&self, service: &Service, name: &str, target: u16, backends: &[Backend]) {
        for (family, tag) in [("IPv4", "v4"), ("IPv6", "v6")] {
            let own = backends.iter().map(|backend| &backend.0).filter(|object| {
                let address = object.pointer("/addresses/0").and_then(Value::as_str);
                address.is_some_and(|address| address.contains(':') == (tag == "v6"))
            });
            let endpoints: Vec<Value> = own.cloned().collect();
            let ports: Vec<Value> = service
                .ports
                .iter()
                .map(|(name, (protocol, _, _))| {
                    json!({"name": name, "protocol": protocol, "port": target})
                })
                .collect();
            self.put(&json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {
                    "name": format!("{name}-{tag}"), "namespace": "shop",
                    "labels": {"kubernetes.io/service-name": service.name},
                },
                "addressType": family, "ports": ports, "endpoints": endpoints,
            }));
        }
    }

    /// The arguments with which nftlet works on this directory as `node-1`.
    pub fn arguments<'a>(&'a self, more: &[&'a str]) -> Vec<&'a str> {
        let path = self.path().to_str().expect("a path in UTF-8");
        let mut arguments = vec!["--manifests", path, "--hostname-override", "node-1"];
        arguments.extend(more);
        arguments
    }

    /// Programs a namespace once and returns what nftlet said.
    #[track_caller]
    pub fn program(&self, node: &Namespace, more: &[&str]) -> String {
        let mut arguments = self.arguments(more);
        arguments.push("--once");
        let output = node
            .command(env!("CARGO_BIN_EXE_nftlet"))
            .args(arguments)
            .output()
            .expect("nftlet runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {said}", output.status);
        said.into_owned()
    }

    /// Runs nftlet in a namespace and waits until it has written its rules.
    #[track_caller]
    pub fn run(&self, node: &Namespace, more: &[&str]) -> Daemon {
        let daemon = Daemon::start(node, env!("CARGO_BIN_EXE_nftlet"), self.arguments(more));
        wait_for("the first rules", PATIENCE, || {
            daemon.log().contains("rules are in place").then_some(())
        });
        daemon
    }
}

/// A service to be written as a manifest.
#[derive(Clone, Debug, Default)]
pub struct Service {
    /// Its name, in the namespace `shop`.
    pub name: String,
    /// `type`; ClusterIP when empty.
    pub kind: String,
    /// `clusterIPs`.
    pub cluster_ips: Vec<String>,
    /// Port name to protocol, port and NodePort.
    pub ports: BTreeMap<String, (String, u16, Option<u16>)>,
    /// `externalIPs`.
    pub external_ips: Vec<String>,
    /// The addresses of the load balancer.
    pub load_balancer_ips: Vec<String>,
    /// Merge patches for the object, for all other fields.
    pub patches: Vec<Value>,
}

impl Service {
    /// A service with a ClusterIP of each family that ends in the given number.
    pub fn new(name: &str, last: u8) -> Self {
        Self {
            name: name.into(),
            cluster_ips: vec![format!("10.96.0.{last}"), format!("fd00:10:96::{last:x}")],
            ..Self::default()
        }
    }

    /// With a port more.
    #[must_use]
    pub fn port(mut self, name: &str, protocol: &str, port: u16, node: Option<u16>) -> Self {
        self.ports
            .insert(name.into(), (protocol.into(), port, node));
        self
    }

    /// With a merge patch for the object: `json!({"spec": {"externalTrafficPolicy": "Local"}})`.
    #[must_use]
    pub fn patch(mut self, patch: Value) -> Self {
        self.patches.push(patch);
        self
    }

    pub fn object(&self) -> Value {
        let ports: Vec<Value> = self
            .ports
            .iter()
            .map(|(name, (protocol, port, node))| {
                json!({"name": name, "protocol": protocol, "port": port, "nodePort": node})
            })
            .collect();
        let kind = match self.kind.as_str() {
            "" => "ClusterIP",
            kind => kind,
        };
        let ingress: Vec<Value> = self
            .load_balancer_ips
            .iter()
            .map(|ip| json!({"ip": ip}))
            .collect();
        let mut object = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": self.name, "namespace": "shop"},
            "spec": {
                "type": kind, "ports": ports,
                "clusterIP": self.cluster_ips.first(), "clusterIPs": self.cluster_ips,
                "externalIPs": self.external_ips,
            },
            "status": {"loadBalancer": {"ingress": ingress}},
        });
        for patch in &self.patches {
            merge(&mut object, patch);
        }
        object
    }
}

/// An endpoint to be written into a slice.
#[derive(Clone, Debug)]
pub struct Backend(Value);

impl Backend {
    /// A ready endpoint on a node.
    pub fn new(address: impl ToString, node: &str) -> Self {
        Self(json!({
            "addresses": [address.to_string()],
            "conditions": {"ready": true},
            "nodeName": node,
        }))
    }

    /// On its way out, still serving.
    #[must_use]
    pub fn terminating(self) -> Self {
        self.patch(json!({"conditions": {"ready": false, "serving": true, "terminating": true}}))
    }

    /// With hints for these zones.
    #[must_use]
    pub fn for_zones(self, zones: &[&str]) -> Self {
        let names: Vec<Value> = zones.iter().map(|name| json!({"name": name})).collect();
        self.patch(json!({"hints": {"forZones": names}}))
    }

    /// With hints for these nodes.
    #[must_use]
    pub fn for_nodes(self, nodes: &[&str]) -> Self {
        let names: Vec<Value> = nodes.iter().map(|name| json!({"name": name})).collect();
        self.patch(json!({"hints": {"forNodes": names}}))
    }

    /// With a merge patch for the endpoint.
    #[must_use]
    pub fn patch(mut self, patch: Value) -> Self {
        merge(&mut self.0, &patch);
        self
    }
}
