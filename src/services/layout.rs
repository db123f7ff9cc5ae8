//! The names and declarations of the tables' sets.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use crate::engine::table_family;
use crate::model::{self, Protocol};
use crate::nft::{Declaration, Element, Key, Name, Selector, Set, SetKind, TableId, readable_name};

/// The name of the service tables, one in the family `ip` and one in `ip6`.
pub const TABLE: &str = "nftlet";

/// The most clients that the services of a namespace remember, in each family.
pub const MOST_CLIENTS: u32 = 1 << 18;
/// The pod network, where it is known by its addresses.
pub(super) const POD_NETWORKS: &str = "pod-networks";
/// The addresses NodePorts answer on, as far as they are the host's.
pub(super) const NODEPORT_ADDRESSES: &str = "nodeport-addresses";
/// The ranges ClusterIPs are taken from.
pub(super) const SERVICE_CIDRS: &str = "service-cidrs";

/// The service table of an address family.
pub fn table_id(family: model::Family) -> TableId {
    TableId::new(table_family(family), TABLE)
}

/// How a frontend is found in a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum By {
    /// By destination address, protocol and port.
    Address,
    /// By protocol and port, on the node's own addresses.
    NodePort,
}

impl By {
    /// The fields of a packet that identify the frontend.
    pub(super) fn key(self) -> Vec<Selector> {
        let port = [Selector::L4Protocol, Selector::DestinationPort];
        match self {
            By::Address => [&[Selector::DestinationAddress][..], &port].concat(),
            By::NodePort => port.into(),
        }
    }

    /// The same fields of a packet whose destination was translated already.
    pub(super) fn original_key(self) -> Vec<Selector> {
        let port = [Selector::L4Protocol, Selector::OriginalDestinationPort];
        match self {
            By::Address => [&[Selector::OriginalDestinationAddress][..], &port].concat(),
            By::NodePort => port.into(),
        }
    }

    /// The key of an endpoint: the frontend's and a random number below the number of endpoints.
    pub(super) fn endpoint_key(self, endpoints: u32) -> Vec<Selector> {
        let mut key = self.key();
        key.push(Selector::RandomIndex { modulus: endpoints });
        key
    }

    /// The map of a scope's endpoints.
    pub(super) fn endpoints(self, scope: Scope) -> ServiceSet {
        match (self, scope) {
            (By::Address, Scope::Cluster) => ServiceSet::Endpoints,
            (By::Address, Scope::Local) => ServiceSet::LocalEndpoints,
            (By::NodePort, Scope::Cluster) => ServiceSet::NodePortEndpoints,
            (By::NodePort, Scope::Local) => ServiceSet::NodePortLocalEndpoints,
        }
    }

    /// The verdict map of a scope's frontends.
    pub fn frontends(self, scope: Scope) -> ServiceSet {
        match (self, scope) {
            (By::Address, Scope::Cluster) => ServiceSet::Frontends,
            (By::Address, Scope::Local) => ServiceSet::LocalFrontends,
            (By::NodePort, Scope::Cluster) => ServiceSet::NodePorts,
            (By::NodePort, Scope::Local) => ServiceSet::NodePortsLocal,
        }
    }

    /// The verdict map of the frontends whose clients are remembered.
    pub(super) fn affinity(self) -> ServiceSet {
        match self {
            By::Address => ServiceSet::AffinityFrontends,
            By::NodePort => ServiceSet::AffinityNodePorts,
        }
    }
}

/// Which endpoints traffic may reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scope {
    /// Those of the cluster, narrowed by topology.
    Cluster,
    /// Those on this node.
    Local,
}

/// The key by which a client's endpoint is remembered: the client and the frontend.
pub(super) fn affinity_key() -> Vec<Selector> {
    [&[Selector::SourceAddress][..], &By::Address.key()].concat()
}

/// The same key for a packet whose destination was translated already.
pub(super) fn original_affinity_key() -> Vec<Selector> {
    [&[Selector::SourceAddress][..], &By::Address.original_key()].concat()
}

/// The value of maps to an endpoint.
pub(super) fn target() -> Vec<Selector> {
    vec![Selector::DestinationAddress, Selector::DestinationPort]
}

/// What remembers the clients of one namespace's services with session affinity.
///
/// Each namespace has sets of its own, so that whoever fills them harms no other namespace. They
/// exist with the chain that looks clients up (`SharedChain::Follow`).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Clients(Arc<str>);

impl Clients {
    /// Those of a namespace.
    pub fn of(namespace: &str) -> Self {
        Self(Arc::from(namespace))
    }

    /// The namespace.
    pub fn namespace(&self) -> &str {
        &self.0
    }

    /// A name with the namespace in it. No other name has the sign before it.
    pub(super) fn name(&self, what: &str) -> Name {
        readable_name(&format!("{what}/{}", self.0))
    }

    /// The map that remembers which endpoint a client was sent to; filled by packets.
    pub fn map(&self) -> Name {
        self.name("affinity")
    }

    /// The set that counts the packets of clients that could not be remembered, by protocol.
    pub fn forgotten(&self) -> Name {
        self.name("not-remembered")
    }

    /// Both sets.
    pub(super) fn sets(&self) -> [(Name, Set); 2] {
        static FORGOTTEN: LazyLock<Set> = LazyLock::new(|| {
            let declaration = Declaration {
                counter: true,
                ..Declaration::new(SetKind::Set, [Selector::L4Protocol])
            };
            let protocols = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter();
            let element = |p: Protocol| Element::new(Key::build().protocol(p.number()).finish());
            Set {
                elements: protocols.map(element).collect(),
                ..Set::from(declaration)
            }
        });
        let map = Set {
            declaration: affinity_declaration(),
            elements: Vec::new(),
        };
        [(self.map(), map), (self.forgotten(), FORGOTTEN.clone())]
    }
}

/// The declaration of [`Clients::map`]. Elements get the lifetime of their service; the default
/// given here is kube-proxy's.
pub fn affinity_declaration() -> Arc<Declaration> {
    static DECLARATION: LazyLock<Arc<Declaration>> = LazyLock::new(|| {
        Arc::new(Declaration {
            timeout: Some(Duration::from_secs(10_800)),
            size: Some(MOST_CLIENTS),
            ..Declaration::new(SetKind::Map(target()), affinity_key())
        })
    });
    DECLARATION.clone()
}

macro_rules! service_sets {
    ($($(#[$doc:meta])* $set:ident $name:literal $declaration:expr;)*) => {
        /// A set whose elements services make.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum ServiceSet {
            $($(#[$doc])* $set,)*
        }

        impl ServiceSet {
            /// Every such set.
            pub const ALL: &[ServiceSet] = &[$(ServiceSet::$set,)*];

            /// The name in the table.
            pub fn name(self) -> Name {
                match self {
                    $(ServiceSet::$set => {
                        static NAME: LazyLock<Name> = LazyLock::new(|| Name::from($name));
                        NAME.clone()
                    })*
                }
            }

            /// The declaration, the same in both families.
            pub fn declaration(self) -> Arc<Declaration> {
                match self {
                    $(ServiceSet::$set => {
                        static DECLARATION: LazyLock<Arc<Declaration>> =
                            LazyLock::new(|| Arc::new($declaration));
                        DECLARATION.clone()
                    })*
                }
            }
        }
    };
}

fn verdicts(key: Vec<Selector>) -> Declaration {
    Declaration::new(SetKind::VerdictMap, key)
}

fn targets(by: By) -> Declaration {
    Declaration::new(SetKind::Map(target()), by.endpoint_key(1))
}

service_sets! {
    /// (frontend, index) to endpoint.
    Endpoints "endpoints" targets(By::Address);
    /// (frontend, index) to endpoint on this node, for external policy Local.
    LocalEndpoints "local-endpoints" targets(By::Address);
    /// (NodePort, index) to endpoint.
    NodePortEndpoints "nodeport-endpoints" targets(By::NodePort);
    /// (NodePort, index) to endpoint on this node, for external policy Local.
    NodePortLocalEndpoints "nodeport-local-endpoints" targets(By::NodePort);
    /// Frontend to the chain that handles it.
    Frontends "frontends" verdicts(By::Address.key());
    /// Frontend with external policy Local to the chain for clients outside of this node.
    LocalFrontends "local-frontends" verdicts(By::Address.key());
    /// Frontend with source ranges to the chain that handles clients inside of them.
    FirewalledFrontends "firewalled-frontends" verdicts(By::Address.key());
    /// NodePort to the chain that handles it.
    NodePorts "nodeports" verdicts(By::NodePort.key());
    /// NodePort with external policy Local to the chain for clients outside of this node.
    NodePortsLocal "nodeports-local" verdicts(By::NodePort.key());
    /// Frontend with session affinity to the chain that remembers its clients.
    AffinityFrontends "affinity-frontends" verdicts(By::Address.key());
    /// NodePort with session affinity to the chain that remembers its clients.
    AffinityNodePorts "affinity-nodeports" verdicts(By::NodePort.key());
    /// The ClusterIPs in use.
    ClusterIps "cluster-ips" Declaration::new(SetKind::Set, [Selector::DestinationAddress]);
    /// Pairs of an endpoint's address with itself, for endpoints that may be on this node.
    Hairpin "hairpin" Declaration::new(
        SetKind::Set,
        [Selector::SourceAddress, Selector::DestinationAddress],
    );
}
