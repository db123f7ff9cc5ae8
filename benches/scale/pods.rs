//! Network policies, and the pods and namespaces that they are about.
//!
//! A hundred pods in each namespace, ten of each of ten applications; the first 110 pods run on
//! the node that is measured. Ten policies in each namespace as long as there are policies: five
//! are about all pods and five about one application, and each names an application as peer, some
//! of them in all namespaces of a team. It is the cluster of the benchmark `policies`, as an API
//! server sends it.

#![allow(dead_code, reason = "each benchmark uses its own part")]

use std::net::Ipv4Addr;

use nftlet::model::Kind;
use serde_json::{Value, json};

use crate::cluster::{Put, managed, timestamp, uid};
use crate::workload::NODE;

const LOCAL: usize = 110;
const PODS_OF_NAMESPACE: usize = 100;
const APPLICATIONS: usize = 10;
const POLICIES_OF_NAMESPACE: usize = 10;
/// The policies that are about all pods have these applications as peers: what happens to such a
/// pod changes rules on this node.
const PEERS: usize = 5;
const TEAMS: usize = 20;

/// Pods and policies.
pub struct Pods {
    pods: usize,
    policies: usize,
    namespaces: usize,
    /// The application of each pod.
    applications: Vec<usize>,
}

impl Pods {
    /// So many pods and policies.
    pub fn new(pods: usize, policies: usize) -> Self {
        let namespaces = pods.div_ceil(PODS_OF_NAMESPACE);
        let applications = (0..pods).map(|number| number / namespaces % APPLICATIONS);
        Self {
            pods,
            policies,
            namespaces,
            applications: applications.collect(),
        }
    }

    /// Everything there is at first.
    pub fn objects(&self) -> impl Iterator<Item = Put> + '_ {
        let namespaces = (0..self.namespaces).map(|number| (Kind::Namespace, namespace(number)));
        let pods = (0..self.pods).map(|number| (Kind::Pod, self.pod(number)));
        let policies = (0..self.policies).map(|number| (Kind::NetworkPolicy, self.policy(number)));
        namespaces.chain(pods).chain(policies)
    }

    /// Makes a pod of another node one of another application, where that matters to policies.
    pub fn relabel(&mut self, change: usize) -> Put {
        let with_policies = self.policies.div_ceil(POLICIES_OF_NAMESPACE);
        let with_policies = with_policies.clamp(1, self.namespaces);
        // Rows of pods, one in each namespace; the first two may have local ones.
        let rows = (2..PODS_OF_NAMESPACE).filter(|row| row % APPLICATIONS < PEERS);
        let rows: Vec<usize> = rows.collect();
        let row = rows[change / with_policies % rows.len()];
        let number = (row * self.namespaces + change % with_policies) % self.pods;
        self.applications[number] = (self.applications[number] + 1) % PEERS;
        (Kind::Pod, self.pod(number))
    }

    fn pod(&self, number: usize) -> Value {
        let application = format!("app-{}", self.applications[number]);
        let deployment = format!("app-{}-6d4cf56db6", number / self.namespaces % APPLICATIONS);
        let node = match number {
            0..LOCAL => NODE.to_owned(),
            _ => format!("node-{}", 1 + number % 199),
        };
        let address = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 128, 0, 1)) + number as u32);
        let conditions = ["PodScheduled", "Initialized", "ContainersReady", "Ready"].map(|type_| {
            json!({"type": type_, "status": "True",
                "lastTransitionTime": timestamp(1_700_000_000)})
        });
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": format!("{deployment}-{number:x}"),
                "generateName": format!("{deployment}-"),
                "namespace": format!("ns-{}", number % self.namespaces),
                "uid": uid("9", number),
                "creationTimestamp": timestamp(1_700_000_000 + number as i64),
                "labels": {"app": application, "release": "r1", "pod-template-hash": "6d4cf56db6"},
                "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet",
                    "name": deployment, "uid": uid("8", number),
                    "controller": true, "blockOwnerDeletion": true}],
                "managedFields": [
                    managed("kube-controller-manager", &SPEC_FIELDS),
                    managed("kubelet", &STATUS_FIELDS),
                ],
            },
            "spec": {
                "nodeName": node,
                "containers": [{
                    "name": "main",
                    "image": "registry.example/team/application:1.2.3",
                    "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}],
                    "env": [{"name": "GOMAXPROCS", "value": "2"}],
                    "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}},
                    "volumeMounts": [{"name": "token", "readOnly": true,
                        "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}],
                }],
                "restartPolicy": "Always",
                "serviceAccountName": "default",
                "tolerations": [{"key": "node.kubernetes.io/not-ready", "operator": "Exists",
                    "effect": "NoExecute", "tolerationSeconds": 300}],
            },
            "status": {
                "phase": "Running",
                "podIP": address.to_string(),
                "podIPs": [{"ip": address.to_string()}],
                "hostIP": "192.168.10.2",
                "conditions": conditions,
                "qosClass": "Burstable",
            },
        })
    }

    fn policy(&self, number: usize) -> Value {
        let namespace = number / POLICIES_OF_NAMESPACE % self.namespaces;
        let of_namespace = number % POLICIES_OF_NAMESPACE;
        let one = |application| json!({"matchLabels": {"app": format!("app-{application}")}});
        let mut peer = json!({"podSelector": one(of_namespace)});
        if of_namespace == 3 {
            peer["namespaceSelector"] = json!({"matchLabels": {"team": team(namespace)}});
        }
        let selected = if of_namespace < PEERS {
            json!({})
        } else {
            one(of_namespace)
        };
        let (type_, rules, side) = match of_namespace {
            4 => ("Egress", "egress", "to"),
            _ => ("Ingress", "ingress", "from"),
        };
        json!({
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {
                "name": format!("policy-{number}"),
                "namespace": format!("ns-{namespace}"),
                "uid": uid("4", number),
            },
            "spec": {
                "podSelector": selected,
                "policyTypes": [type_],
                (rules): [{(side): [peer], "ports": [{"protocol": "TCP", "port": 8080}]}],
            },
        })
    }
}

const SPEC_FIELDS: [&str; 6] = [
    "metadata/generateName",
    "metadata/labels/app",
    "metadata/labels/pod-template-hash",
    "metadata/ownerReferences",
    "spec/containers/k:{\"name\":\"main\"}",
    "spec/restartPolicy",
];
const STATUS_FIELDS: [&str; 3] = ["status/conditions", "status/podIP", "status/podIPs"];

fn team(namespace: usize) -> String {
    format!("team-{}", namespace % TEAMS)
}

fn namespace(number: usize) -> Value {
    let name = format!("ns-{number}");
    json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": name, "uid": uid("3", number), "labels": {
            "kubernetes.io/metadata.name": name, "team": team(number)}},
    })
}
