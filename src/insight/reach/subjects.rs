//! Pods and addresses outside of the cluster, and where they are.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use super::classes::Holder;
use super::decisions::Decisions;
use crate::insight::Facts;
use crate::model::{Family, Pod};

/// The name of the addresses outside of the cluster.
pub(crate) const INTERNET: &str = "internet";

/// What a row is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum By {
    Pod,
    #[default]
    Workload,
    Namespace,
}

/// A pod, or an address outside of the cluster.
#[derive(Clone, Debug)]
pub(super) struct Subject {
    pub namespace: String,
    /// Namespace and name.
    pub pod: String,
    workload: String,
    pub class: usize,
    pub home: usize,
}

/// The classes of a pod's addresses, IPv4 first.
pub(super) type Addresses = [Option<usize>; 2];

impl Subject {
    pub fn named(&self, by: By) -> &str {
        match by {
            By::Pod => &self.pod,
            By::Workload => &self.workload,
            By::Namespace => &self.namespace,
        }
    }

    /// Returns the row of this subject, if a name selects it.
    pub fn selected(&self, (kind, name): (Option<Kind>, &str), by: By) -> Option<&str> {
        let is_pod = kind != Some(Kind::Workload) && self.pod == name;
        let is_workload = kind != Some(Kind::Pod) && self.workload == name;
        if is_pod && !is_workload {
            return Some(&self.pod);
        }
        let is_namespace = kind.is_none() && self.namespace == name;
        (is_pod || is_workload || is_namespace).then(|| match by {
            By::Namespace if !is_namespace => &self.workload,
            by => self.named(by),
        })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Pod,
    Workload,
}

/// Splits `pod/` or `deploy/` from a name.
pub(super) fn without_kind(name: &str) -> (Option<Kind>, &str) {
    match name.split_once('/') {
        Some(("pod" | "pods", rest)) if rest.contains('/') => (Some(Kind::Pod), rest),
        Some(("deploy" | "deployment" | "deployments", rest)) if rest.contains('/') => {
            (Some(Kind::Workload), rest)
        }
        _ => (None, name),
    }
}

/// Numbers the classes and homes of pods.
#[derive(Default)]
pub(super) struct Subjects {
    pub all: Vec<Subject>,
    pub classes: Vec<Addresses>,
    class_ids: HashMap<Addresses, usize>,
    homes: HashMap<String, usize>,
    /// Addresses at each home, by family.
    at_home: Vec<[Option<IpAddr>; 2]>,
    /// The homes of nodes.
    nodes: BTreeSet<usize>,
    /// The homes of addresses that perhaps pods have.
    uncertain: BTreeSet<usize>,
    /// The number of host-network pods whose addresses no Node has.
    pub without_node: usize,
}

impl Subjects {
    pub fn add_pod(&mut self, pod: &Pod, addresses: &[(IpAddr, usize)], holder: Holder) {
        let namespace = pod.name.namespace().to_owned();
        let owner = pod.owner.as_deref().unwrap_or(pod.name.name());
        self.without_node += usize::from(pod.host_network && holder == Holder::Outside);
        // Nodes are distinguished by their addresses.
        let home = match holder {
            Holder::Node | Holder::Uncertain(_) => format!("{addresses:?}"),
            Holder::Pod | Holder::Outside => pod.node.as_deref().unwrap_or_default().to_owned(),
        };
        let subject = Subject {
            workload: format!("{namespace}/{owner}"),
            pod: pod.name.to_string(),
            namespace,
            class: self.class(addresses),
            home: self.home(home, addresses),
        };
        match holder {
            Holder::Node => self.nodes.insert(subject.home),
            Holder::Uncertain(_) => self.uncertain.insert(subject.home),
            Holder::Pod | Holder::Outside => false,
        };
        self.all.push(subject);
    }

    pub fn add_outside(&mut self, address: IpAddr, class: usize) {
        let addresses = [(address, class)];
        let subject = Subject {
            namespace: INTERNET.to_owned(),
            pod: INTERNET.to_owned(),
            workload: INTERNET.to_owned(),
            class: self.class(&addresses),
            home: self.home(format!("{addresses:?}"), &addresses),
        };
        self.all.push(subject);
    }

    fn class(&mut self, addresses: &[(IpAddr, usize)]) -> usize {
        let of = |family| {
            let mut of_family = addresses.iter();
            let found = of_family.find(|(address, _)| Family::of(*address) == family);
            found.map(|(_, class)| *class)
        };
        let key = Family::ALL.map(of);
        let next = self.classes.len();
        let id = *self.class_ids.entry(key).or_insert(next);
        if id == next {
            self.classes.push(key);
        }
        id
    }

    fn home(&mut self, name: String, addresses: &[(IpAddr, usize)]) -> usize {
        let next = self.at_home.len();
        let home = *self.homes.entry(name).or_insert(next);
        if home == next {
            self.at_home.push([None, None]);
        }
        if let Some(at_home) = self.at_home.get_mut(home) {
            for (known, family) in at_home.iter_mut().zip(Family::ALL) {
                let mut addresses = addresses.iter().map(|(address, _)| *address);
                let found = addresses.find(|address| Family::of(*address) == family);
                *known = known.or(found);
            }
        }
        home
    }

    /// Returns, by family and home of a node, the homes of its own pods.
    pub fn own(&self, facts: &Facts, decisions: &Decisions) -> [HashMap<usize, Vec<usize>>; 2] {
        let nodes = facts.policies.inventory().nodes();
        let mut own: [HashMap<usize, Vec<usize>>; 2] = Default::default();
        for (family, own) in own.iter_mut().enumerate() {
            for node in &self.nodes {
                let address = |home: usize| *self.at_home.get(home)?.get(family)?;
                let Some(source) = address(*node) else {
                    continue;
                };
                let names = nodes.having(std::slice::from_ref(&source));
                // The agent may not know its own Node as one of all.
                let names = names.map(|name| name.name()).chain([facts.node]);
                let homes = names.filter_map(|name| self.homes.get(name).copied());
                let homes: BTreeSet<usize> = homes.chain(self.uncertain.iter().copied()).collect();
                let is_own = |home: &usize| {
                    address(*home).is_some_and(|pod| decisions.is_own_node(source, pod))
                };
                let homes: Vec<usize> = homes.into_iter().filter(is_own).collect();
                if !homes.is_empty() {
                    own.insert(*node, homes);
                }
            }
        }
        own
    }
}
