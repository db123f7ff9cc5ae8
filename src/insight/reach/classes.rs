//! Classes of addresses: no policy distinguishes the addresses of one.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;

use crate::insight::Facts;
use crate::model::{Family, Labels, NamedPort, ObjectName, Pod, Protocol};
use crate::policies::{Conditions, Direction, Index, KnownProfiles, PeerCondition, PodPolicies};

/// The number of a condition.
pub(super) type ConditionId = u32;

/// What has an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Holder {
    /// A pod, for certain.
    Pod,
    /// A node, and its host-network pods.
    Node,
    /// No pod or node of which an object is known.
    Outside,
    /// Perhaps a pod, as where several pods claim the address.
    Uncertain(IpAddr),
}

/// What policies may distinguish addresses by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    family: Family,
    holder: Holder,
    met: Rc<[ConditionId]>,
    ports: Arc<[NamedPort]>,
    policies: [Option<Rc<str>>; 2],
    bridges: Vec<usize>,
}

/// Addresses with the same answers to all conditions, and the same policies and named ports.
#[derive(Clone, Debug)]
pub(super) struct AddressClass {
    pub family: Family,
    pub holder: Holder,
    /// The conditions that are met, sorted.
    pub met: Rc<[ConditionId]>,
    /// The named ports of its pods.
    pub ports: Arc<[NamedPort]>,
    /// The ids of the policies for egress and ingress.
    pub policies: [Option<Rc<str>>; 2],
    /// The bridges whose packets no rule sees, as indices.
    pub bridges: Vec<usize>,
    /// A few addresses of it, if possible of pods on different nodes; of nodes all.
    pub examples: Vec<IpAddr>,
    nodes: BTreeSet<Option<Arc<str>>>,
}

/// The conditions of the policies that apply to a pod.
#[derive(Debug, Default)]
pub(super) struct Asked {
    pub peers: BTreeSet<ConditionId>,
    pub ports: BTreeSet<(Protocol, u16, u16)>,
    pub named_ports: bool,
}

/// Egress and ingress, in the order in which a packet meets them.
pub(super) const DIRECTIONS: [Direction; 2] = [Direction::Egress, Direction::Ingress];

/// What policies know of the pods with some labels in a namespace.
#[derive(Clone, Debug)]
struct OfLabels {
    policies: [Option<Rc<str>>; 2],
    met: Rc<[ConditionId]>,
}

/// Finds the class of an address.
pub(super) struct Classes<'a> {
    facts: &'a Facts<'a>,
    pub all: Vec<AddressClass>,
    ids: HashMap<Key, usize>,
    /// By direction and the id of policies.
    pub asked: [HashMap<Rc<str>, Asked>; 2],
    /// What is asked about addresses, not about pods.
    of_addresses: Vec<(PeerCondition, ConditionId)>,
    selectors: Index<ConditionId>,
    known: HashMap<(Box<str>, Labels), OfLabels>,
}

impl<'a> Classes<'a> {
    /// Reads the policies of some pods.
    pub fn new(facts: &'a Facts<'a>, pods: &[&Pod]) -> Self {
        let mut classes = Self {
            facts,
            all: Vec::new(),
            ids: HashMap::new(),
            asked: Default::default(),
            of_addresses: Vec::new(),
            selectors: Index::default(),
            known: HashMap::new(),
        };
        let mut conditions = BTreeMap::new();
        let mut profiles = KnownProfiles::default();
        for pod in pods {
            let key = (Box::from(pod.name.namespace()), pod.labels.clone());
            if !pod.host_network && !classes.known.contains_key(&key) {
                let policies = classes.read_policies(pod, &mut profiles, &mut conditions);
                let met = Rc::default();
                classes.known.insert(key, OfLabels { policies, met });
            }
        }
        let inventory = facts.policies.inventory();
        for (condition, id) in conditions {
            match condition {
                PeerCondition::Pods(selector) => {
                    let namespaces = inventory.namespaces();
                    classes.selectors.insert(id, &selector, namespaces);
                }
                other => classes.of_addresses.push((other, id)),
            }
        }
        for ((namespace, labels), of_labels) in &mut classes.known {
            let mut met = BTreeSet::new();
            let of_namespace = inventory.namespace(namespace);
            classes
                .selectors
                .of_pod(namespace, &of_namespace, labels, |id| {
                    met.insert(*id);
                });
            of_labels.met = met.into_iter().collect();
        }
        classes
    }

    /// Returns the ids of the policies of a pod, and reads their conditions.
    fn read_policies(
        &mut self,
        pod: &Pod,
        profiles: &mut KnownProfiles,
        conditions: &mut BTreeMap<PeerCondition, ConditionId>,
    ) -> [Option<Rc<str>>; 2] {
        let engine = self.facts.policies;
        let [egress, ingress] = DIRECTIONS.map(|it| engine.policies_of_pod(pod, it, profiles));
        let [of_egress, of_ingress] = &mut self.asked;
        let mut id = |asked: &mut HashMap<Rc<str>, Asked>, policies: PodPolicies, direction| {
            if let Some((known, _)) = asked.get_key_value(policies.id()) {
                return known.clone();
            }
            let id: Rc<str> = policies.id().into();
            let read = self.facts.policies.conditions(&policies, direction);
            asked.insert(id.clone(), numbered(read, conditions));
            id
        };
        [
            egress.map(|policies| id(of_egress, policies, Direction::Egress)),
            ingress.map(|policies| id(of_ingress, policies, Direction::Ingress)),
        ]
    }

    /// Returns the class of an address; that of a pod is known by the pod.
    pub fn class(&mut self, address: IpAddr, pod: Option<&Pod>) -> usize {
        let facts = self.facts;
        let holder = self.holder(address, pod);
        let of_labels = match (holder, pod) {
            (Holder::Pod, Some(pod)) => {
                let key = (Box::from(pod.name.namespace()), pod.labels.clone());
                self.known.get(&key).cloned()
            }
            _ => None,
        };
        let (policies, met) = of_labels.map_or_else(Default::default, |it| (it.policies, it.met));
        let of_address = self.of_addresses.iter();
        let mut of_address = of_address
            .filter(|(condition, _)| match condition {
                PeerCondition::Pods(_) => false,
                PeerCondition::Block { cidr, except } => {
                    cidr.contains(&address) && !except.iter().any(|net| net.contains(&address))
                }
                PeerCondition::Nodes(labels) => {
                    let nodes = facts.policies.inventory().nodes();
                    nodes.selected(labels, address)
                }
            })
            .map(|(_, id)| *id)
            .peekable();
        let met = match of_address.peek() {
            None => met,
            Some(_) => {
                let all: BTreeSet<_> = met.iter().copied().chain(of_address).collect();
                all.into_iter().collect()
            }
        };
        let bridges = facts.unfiltered.iter().enumerate();
        let bridges = bridges.filter(|(_, network)| network.contains(&address));
        let key = Key {
            family: Family::of(address),
            holder,
            met,
            ports: self.ports(address, holder, pod),
            policies,
            bridges: match holder {
                Holder::Node => Vec::new(),
                _ => bridges.map(|(index, _)| index).collect(),
            },
        };
        let node = pod.and_then(|pod| pod.node.clone());
        let next = self.all.len();
        let id = *self.ids.entry(key).or_insert_with_key(|key| {
            self.all.push(AddressClass {
                family: key.family,
                holder,
                met: key.met.clone(),
                ports: key.ports.clone(),
                policies: key.policies.clone(),
                bridges: key.bridges.clone(),
                examples: Vec::new(),
                nodes: BTreeSet::new(),
            });
            next
        });
        if let Some(class) = self.all.get_mut(id) {
            class.add(address, node);
        }
        id
    }

    fn holder(&self, address: IpAddr, pod: Option<&Pod>) -> Holder {
        let facts = self.facts;
        let inventory = facts.policies.inventory();
        let mut claimants = inventory.claimants(address);
        let first: Option<&ObjectName> = claimants.next();
        let is_node = facts.is_of_any_node(address);
        let is_uncertain = claimants.next().is_some()
            || inventory.departed(address).is_some()
            || facts.policies.is_closed_to(address)
            || (is_node && first.is_some());
        match (first, pod) {
            _ if is_uncertain => Holder::Uncertain(address),
            (None, _) if is_node => Holder::Node,
            (None, _) => Holder::Outside,
            (Some(claimant), Some(pod))
                if *claimant == pod.name && inventory.owner(address) == Some(pod) =>
            {
                Holder::Pod
            }
            _ => Holder::Uncertain(address),
        }
    }

    /// Returns the named ports at an address.
    fn ports(&self, address: IpAddr, holder: Holder, pod: Option<&Pod>) -> Arc<[NamedPort]> {
        match (holder, pod) {
            (Holder::Pod, Some(pod)) => pod.ports.clone(),
            (Holder::Uncertain(_), _) => {
                let inventory = self.facts.policies.inventory();
                let names = inventory.claimants(address);
                let pods = names.filter_map(|name| inventory.pod(name));
                let pods = pods.chain(inventory.departed(address));
                let ports: BTreeSet<_> = pods.flat_map(|pod| pod.ports.iter().cloned()).collect();
                ports.into_iter().collect()
            }
            _ => Arc::default(),
        }
    }
}

impl AddressClass {
    fn add(&mut self, address: IpAddr, node: Option<Arc<str>>) {
        let is_on_other_node = self.nodes.len() < 2 && !self.nodes.contains(&node);
        let is_useful = match self.holder {
            Holder::Node => true,
            _ => is_on_other_node || self.examples.len() < 2,
        };
        if is_useful && !self.examples.contains(&address) {
            self.examples.push(address);
        }
        if self.nodes.len() < 2 {
            self.nodes.insert(node);
        }
    }
}

fn numbered(conditions: Conditions, numbers: &mut BTreeMap<PeerCondition, ConditionId>) -> Asked {
    let peers = conditions.peers.into_iter().map(|peer| {
        let next = u32::try_from(numbers.len()).unwrap_or(u32::MAX);
        *numbers.entry(peer).or_insert(next)
    });
    Asked {
        peers: peers.collect(),
        ports: conditions.ports,
        named_ports: conditions.named_ports,
    }
}
