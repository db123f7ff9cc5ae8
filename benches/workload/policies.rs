//! Pods and the network policies that are about them, as facts.
//!
//! There are 100 pods in each namespace, ten of each of ten applications; 110 pods run on the node
//! that is programmed, in as many namespaces as possible. Each namespace has ten policies as long
//! as there are policies: five select one application, five all pods; most allow another
//! application of the namespace, some one of all namespaces of a team.

#![allow(dead_code, reason = "each benchmark uses its own part")]

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use nftlet::model::{
    Delivery, Event, Evidence, Kind, LabelSelector, Labels, NamedPort, Namespace as NamespaceFacts,
    NetworkPolicy, Object, ObjectName, Peer, Pod, PolicyPort, PolicyRule, PortMatch, Protocol,
    Requirement, Sandbox,
};

/// The node that is programmed.
pub const NODE: &str = "node-0";
/// The pods that run on it.
pub const LOCAL: usize = 110;
const PODS_OF_NAMESPACE: usize = 100;
/// The applications that pods are of.
pub const APPLICATIONS: usize = 10;
/// Those that policies of the pods of this node allow, so that a pod of any other touches no set.
pub const ALLOWED: usize = 5;
const POLICIES_OF_NAMESPACE: usize = 10;
const TEAMS: usize = 20;

/// A cluster with pods and policies.
pub struct Cluster {
    names: Vec<Arc<str>>,
    /// The labels of the pods of each application.
    pub labels: Vec<Labels>,
    ports: Arc<[NamedPort]>,
    nodes: Vec<Arc<str>>,
    pods: usize,
    policies: usize,
}

fn one(key: &str, value: &str) -> LabelSelector {
    LabelSelector::new([Requirement::In(key.into(), vec![value.into()])])
}

fn application(number: usize) -> String {
    format!("app-{}", number % APPLICATIONS)
}

impl Cluster {
    /// So many pods and policies.
    pub fn new(pods: usize, policies: usize) -> Self {
        let application = |number| [("app", application(number)), ("release", "r1".into())];
        Self {
            names: (0..pods.div_ceil(PODS_OF_NAMESPACE))
                .map(|number| format!("ns-{number}").into())
                .collect(),
            labels: (0..APPLICATIONS)
                .map(|number| application(number).into_iter().collect())
                .collect(),
            ports: Arc::new([NamedPort {
                name: "http".into(),
                protocol: Protocol::Tcp,
                port: 8080,
            }]),
            nodes: (0..200).map(|node| format!("node-{node}").into()).collect(),
            pods,
            policies,
        }
    }

    /// Pods are dealt to the namespaces in turn, and the first ones run here.
    pub fn pod(&self, number: usize) -> Pod {
        let namespace = &self.names[number % self.names.len()];
        let host = u32::from(Ipv4Addr::new(10, 128, 0, 1)) + number as u32;
        let node = if number < LOCAL { 0 } else { 1 + number % 199 };
        Pod {
            name: ObjectName::new(namespace, &format!("pod-{number}")),
            node: Some(self.nodes[node].clone()),
            host_network: false,
            ended: false,
            running: true,
            evidence: Evidence {
                sandbox: Sandbox::RanAt(number as u32),
                started: Some(number as u32),
            },
            addresses: [IpAddr::from(Ipv4Addr::from(host))].into_iter().collect(),
            labels: self.labels[number / self.names.len() % APPLICATIONS].clone(),
            ports: self.ports.clone(),
        }
    }

    /// A pod that comes later, in a namespace with policies, of an application that they allow.
    pub fn later_pod(&self, number: usize) -> Pod {
        let with_policies = (self.policies / POLICIES_OF_NAMESPACE).clamp(1, self.names.len());
        let rounds = self.pods.div_ceil(self.names.len()) + number;
        Pod {
            labels: self.labels[number % ALLOWED].clone(),
            ..self.pod(rounds * self.names.len() + number % with_policies)
        }
    }

    /// A policy by its number among those that select pods of this node.
    pub fn selecting_policy(&self, number: usize) -> NetworkPolicy {
        self.policy(number / ALLOWED * POLICIES_OF_NAMESPACE + number % ALLOWED)
    }

    /// A policy by its number.
    pub fn policy(&self, number: usize) -> NetworkPolicy {
        let namespace = &self.names[number / POLICIES_OF_NAMESPACE % self.names.len()];
        let of_namespace = number % POLICIES_OF_NAMESPACE;
        let pods = match of_namespace {
            0..5 => LabelSelector::default(),
            selecting => one("app", &application(selecting)),
        };
        let namespaces = (of_namespace == 3).then(|| {
            let team = number / POLICIES_OF_NAMESPACE % TEAMS;
            one("team", &format!("team-{team}"))
        });
        let peer = Peer::Pods {
            namespaces,
            pods: one("app", &application(of_namespace)),
        };
        let port = PolicyPort {
            protocol: Protocol::Tcp,
            port: PortMatch::Range(8080, 8080),
        };
        let rules = vec![PolicyRule {
            peers: Some(vec![peer]),
            ports: Some(vec![port]),
        }];
        let (ingress, egress) = match of_namespace {
            4 => (None, Some(rules)),
            _ => (Some(rules), None),
        };
        NetworkPolicy {
            name: ObjectName::new(namespace, &format!("policy-{number}")),
            pods,
            ingress,
            egress,
        }
    }

    /// Complete lists of all kinds, as a source delivers them when it starts.
    pub fn lists(&self) -> Vec<Delivery> {
        let mut events: Vec<Event> = Kind::ALL.map(Event::ListStarted).into();
        events.extend(self.names.iter().enumerate().map(|(number, name)| {
            let team = format!("team-{}", number % TEAMS);
            let labels = [("kubernetes.io/metadata.name", &**name), ("team", &*team)];
            Event::Apply(Object::Namespace(NamespaceFacts {
                name: ObjectName::new("", name),
                labels: labels.into_iter().collect(),
            }))
        }));
        let policies = (0..self.policies).map(|number| self.policy(number));
        events.extend(policies.map(|policy| Event::Apply(Object::NetworkPolicy(policy))));
        let pods = (0..self.pods).map(|number| self.pod(number));
        events.extend(pods.map(|pod| Event::Apply(Object::Pod(pod))));
        events.extend(Kind::ALL.map(Event::ListComplete));
        events.into_iter().map(Delivery::now).collect()
    }
}
