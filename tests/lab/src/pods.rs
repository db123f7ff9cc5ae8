//! Network policies, and the pods and namespaces that they are about, as an API server sends them.
//!
//! A hundred pods in each namespace, ten of each of ten applications; the first 110 pods run on
//! the node that is programmed. Ten policies in each namespace as long as there are policies: five
//! select all pods and five one application, and each allows one application, some of them in all
//! namespaces of a team. Cluster policies select the pods of a team.

use std::net::Ipv4Addr;

use serde_json::{Value, json};

use crate::cluster::{NODE, Put, above, managed, timestamp, uid};
use crate::fake_api::{CLUSTER_POLICIES, NAMESPACES, PODS, POLICIES};

/// The pods of the node that is programmed.
pub const LOCAL: usize = 110;
const PODS_OF_NAMESPACE: usize = 100;
const APPLICATIONS: usize = 10;
const POLICIES_OF_NAMESPACE: usize = 10;
/// The applications that the policies of all pods allow: a change of such a pod changes rules on
/// this node.
const ALLOWED: usize = 5;
const TEAMS: usize = 20;
const ACTIONS: [&str; 3] = ["Accept", "Deny", "Pass"];

/// Pods and policies.
#[derive(Clone, Copy, Debug)]
pub struct Pods {
    pub pods: usize,
    pub policies: usize,
    /// The address below that of the first pod.
    pub base: Ipv4Addr,
}

/// What a pod is made of.
#[derive(Clone, Copy, Debug)]
pub struct Pod {
    /// Its place among all; the namespace and the name follow from it.
    pub number: usize,
    /// The application that its label names.
    pub application: usize,
    /// Whether it runs on the node that is programmed.
    pub local: bool,
    pub address: Ipv4Addr,
}

impl Pods {
    /// Returns so many pods and policies.
    pub fn new(pods: usize, policies: usize) -> Self {
        let base = Ipv4Addr::new(10, 128, 0, 0);
        Self {
            pods,
            policies,
            base,
        }
    }

    fn namespaces(&self) -> usize {
        self.pods.div_ceil(PODS_OF_NAMESPACE)
    }

    pub fn objects(&self) -> impl Iterator<Item = Put> + '_ {
        let namespaces = (0..self.namespaces()).map(namespace);
        let pods = (0..self.pods).map(|number| self.object(&self.pod(number)));
        let policies = (0..self.policies).map(|number| self.policy(number));
        namespaces.chain(pods).chain(policies)
    }

    /// Returns a pod by its number. Pods are dealt to the namespaces in turn.
    pub fn pod(&self, number: usize) -> Pod {
        Pod {
            number,
            application: number / self.namespaces() % APPLICATIONS,
            local: number < LOCAL,
            address: above(self.base, 1 + number),
        }
    }

    /// Returns a pod that is not among the first ones, in a namespace with policies, of an
    /// application that they allow.
    pub fn later(&self, number: usize) -> Pod {
        let with_policies = self.policies.div_ceil(POLICIES_OF_NAMESPACE);
        let with_policies = with_policies.clamp(1, self.namespaces());
        let rounds = self.pods.div_ceil(self.namespaces()) + number;
        Pod {
            application: number % ALLOWED,
            ..self.pod(rounds * self.namespaces() + number % with_policies)
        }
    }

    /// Returns the namespace and the name of a pod.
    pub fn name(&self, pod: &Pod) -> (String, String) {
        let namespace = format!("ns-{}", pod.number % self.namespaces());
        (
            namespace,
            format!("{}-{:x}", self.deployment(pod), pod.number),
        )
    }

    fn deployment(&self, pod: &Pod) -> String {
        let application = pod.number / self.namespaces() % APPLICATIONS;
        format!("app-{application}-6d4cf56db6")
    }

    /// Returns a pod as an object.
    pub fn object(&self, pod: &Pod) -> Put {
        let (namespace, name) = self.name(pod);
        let deployment = self.deployment(pod);
        let node = match pod.local {
            true => NODE.to_owned(),
            false => format!("node-{}", 1 + pod.number % 199),
        };
        let conditions = ["PodScheduled", "Initialized", "ContainersReady", "Ready"].map(
            |type_| json!({"type": type_, "status": "True", "lastTransitionTime": timestamp(0)}),
        );
        let object = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name,
                "generateName": format!("{deployment}-"),
                "namespace": namespace,
                "uid": uid("9", pod.number),
                "creationTimestamp": timestamp(pod.number),
                "labels": {"app": format!("app-{}", pod.application), "release": "r1",
                    "pod-template-hash": "6d4cf56db6"},
                "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet",
                    "name": deployment, "uid": uid("8", pod.number),
                    "controller": true, "blockOwnerDeletion": true}],
                "managedFields": [managed("kube-controller-manager"), managed("kubelet")],
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
                "podIP": pod.address.to_string(),
                "podIPs": [{"ip": pod.address.to_string()}],
                "hostIP": "192.168.10.2",
                "conditions": conditions,
                "qosClass": "Burstable",
            },
        });
        (PODS, object)
    }

    /// Returns a policy by its number.
    pub fn policy(&self, number: usize) -> Put {
        let namespace = number / POLICIES_OF_NAMESPACE % self.namespaces();
        let of_namespace = number % POLICIES_OF_NAMESPACE;
        let one = json!({"matchLabels": {"app": format!("app-{of_namespace}")}});
        let mut peer = json!({"podSelector": one});
        if of_namespace == 3 {
            peer["namespaceSelector"] = json!({"matchLabels": {"team": team(namespace)}});
        }
        let (type_, rules, side) = match of_namespace {
            4 => ("Egress", "egress", "to"),
            _ => ("Ingress", "ingress", "from"),
        };
        let spec = json!({
            "podSelector": if of_namespace < ALLOWED { json!({}) } else { one },
            "policyTypes": [type_],
            (rules): [{(side): [peer], "ports": [{"protocol": "TCP", "port": 8080}]}],
        });
        policy(
            &format!("ns-{namespace}"),
            &format!("policy-{number}"),
            spec,
        )
    }

    /// Returns the policy `another`, equal to one by its number among those of all pods.
    pub fn another_policy(&self, number: usize) -> Put {
        let number = number / ALLOWED * POLICIES_OF_NAMESPACE + number % ALLOWED;
        let (kind, mut object) = self.policy(number);
        object["metadata"]["name"] = json!("another");
        (kind, object)
    }
}

/// Returns a NetworkPolicy.
pub fn policy(namespace: &str, name: &str, spec: Value) -> Put {
    let object = json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": namespace, "uid": uid("4", 0)},
        "spec": spec,
    });
    (POLICIES, object)
}

/// Returns a ClusterNetworkPolicy by its number: ten rules for egress, each for one application of
/// one team. A hundred of them have 200 peers.
pub fn cluster_policy(number: usize) -> Put {
    let team = |number: usize| json!({"matchLabels": {"team": team(number)}});
    let rules = (0..APPLICATIONS).map(|rule| {
        let application = json!({"matchLabels": {"app": format!("app-{rule}")}});
        let peer = json!({"namespaceSelector": team(number + rule), "podSelector": application});
        json!({"action": ACTIONS[rule % ACTIONS.len()], "to": [{"pods": peer}]})
    });
    let object = json!({
        "apiVersion": "policy.networking.k8s.io/v1alpha2",
        "kind": "ClusterNetworkPolicy",
        "metadata": {"name": format!("policy-{number}"), "uid": uid("5", number)},
        "spec": {"tier": "Admin", "priority": number, "subject": {"namespaces": team(number)},
            "egress": rules.collect::<Vec<_>>()},
    });
    (CLUSTER_POLICIES, object)
}

fn team(namespace: usize) -> String {
    format!("team-{}", namespace % TEAMS)
}

fn namespace(number: usize) -> Put {
    let name = format!("ns-{number}");
    let object = json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": name, "uid": uid("3", number), "labels": {
            "kubernetes.io/metadata.name": name, "team": team(number)}},
    });
    (NAMESPACES, object)
}
