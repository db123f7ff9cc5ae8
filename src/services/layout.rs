//! Names and declarations of the sets in the service tables.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use crate::engine::table_family;
use crate::model::{self, Protocol};
use crate::nft::{Declaration, Element, Key, Name, Selector, Set, SetKind, TableId, readable_name};

/// The name of the service tables, one in the family `ip` and one in `ip6`.
pub const TABLE: &str = "nftlet";

/// The maximum number of clients that the services of a namespace remember, in each family.
pub const MOST_CLIENTS: u32 = 1 << 18;
/// The pod network, if pods are recognised by address.
pub(super) const POD_NETWORKS: &str = "pod-networks";
/// The ranges in which local addresses answer NodePorts.
pub(super) const NODEPORT_ADDRESSES: &str = "nodeport-addresses";
/// The ranges of ClusterIPs.
pub(super) const SERVICE_CIDRS: &str = "service-cidrs";

/// The chain that rejects packets.
pub(super) const REJECT: &str = "reject-service";
/// The chain that marks packets from outside of the pod network.
pub(super) const MARK_OFF_CLUSTER: &str = "mark-off-cluster";
/// The chain that looks up the source ranges of a frontend.
pub(super) const FIREWALLED: &str = "firewalled";
/// The chain for packets from a client in the source ranges.
pub(super) const ALLOWED_CLIENT: &str = "allowed-client";

/// Netfilter's priority of destination translation.
pub(super) const DSTNAT: i32 = -100;

/// Returns the service table of an address family.
pub fn table_id(family: model::Family) -> TableId {
    TableId::new(table_family(family), TABLE)
}

/// The key by which the frontend of a packet is looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum By {
    /// Destination address, protocol and port.
    Address,
    /// Protocol and port, at the node's own addresses.
    NodePort,
}

impl By {
    /// Returns the fields of a packet that identify the frontend.
    pub(super) fn key(self) -> Vec<Selector> {
        let port = [Selector::L4Protocol, Selector::DestinationPort];
        match self {
            By::Address => [&[Selector::DestinationAddress][..], &port].concat(),
            By::NodePort => port.into(),
        }
    }

    /// Returns the same fields for a packet whose destination is already translated.
    pub(super) fn original_key(self) -> Vec<Selector> {
        let port = [Selector::L4Protocol, Selector::OriginalDestinationPort];
        match self {
            By::Address => [&[Selector::OriginalDestinationAddress][..], &port].concat(),
            By::NodePort => port.into(),
        }
    }

    /// Returns the key of an endpoint: that of the frontend, and an index in the priority.
    pub(super) fn endpoint_key(self) -> Vec<Selector> {
        let mut key = self.key();
        key.push(Selector::Priority);
        key
    }

    /// Returns the map of a scope's endpoints.
    pub(super) fn endpoints(self, scope: EndpointScope) -> ServiceSet {
        match (self, scope) {
            (By::Address, EndpointScope::Cluster) => ServiceSet::Endpoints,
            (By::Address, EndpointScope::Local) => ServiceSet::LocalEndpoints,
            (By::NodePort, EndpointScope::Cluster) => ServiceSet::NodePortEndpoints,
            (By::NodePort, EndpointScope::Local) => ServiceSet::NodePortLocalEndpoints,
        }
    }

    /// Returns the name of a chain for frontends with this key.
    pub(super) fn chain(self, name: &str, sticky: bool) -> Name {
        let prefix = match self {
            By::Address => "",
            By::NodePort => "nodeport-",
        };
        let suffix = if sticky { "-sticky" } else { "" };
        format!("{prefix}{name}{suffix}").into()
    }

    /// Returns the name of the verdict map of roles.
    pub(super) fn roles(self) -> Name {
        match self {
            By::Address => "roles",
            By::NodePort => "nodeport-roles",
        }
        .into()
    }

    /// Returns the verdict map of the frontends whose clients are looked up.
    pub(super) fn sticky(self) -> ServiceSet {
        match self {
            By::Address => ServiceSet::StickyFrontends,
            By::NodePort => ServiceSet::StickyNodePorts,
        }
    }

    /// Returns the map of a scope's frontends.
    pub fn frontends(self, scope: EndpointScope) -> ServiceSet {
        match (self, scope) {
            (By::Address, EndpointScope::Cluster) => ServiceSet::Frontends,
            (By::Address, EndpointScope::Local) => ServiceSet::LocalFrontends,
            (By::NodePort, EndpointScope::Cluster) => ServiceSet::NodePorts,
            (By::NodePort, EndpointScope::Local) => ServiceSet::NodePortsLocal,
        }
    }

    /// Returns the verdict map of the frontends with session affinity.
    pub(super) fn affinity(self) -> ServiceSet {
        match self {
            By::Address => ServiceSet::AffinityFrontends,
            By::NodePort => ServiceSet::AffinityNodePorts,
        }
    }
}

/// The endpoints that traffic may reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EndpointScope {
    /// Those of the cluster, after topology hints.
    Cluster,
    /// Those on this node.
    Local,
}

/// Returns the key by which an endpoint is remembered: client and frontend.
pub(super) fn affinity_key() -> Vec<Selector> {
    [&[Selector::SourceAddress][..], &By::Address.key()].concat()
}

/// Returns the same key for a packet whose destination is already translated.
pub(super) fn original_affinity_key() -> Vec<Selector> {
    [&[Selector::SourceAddress][..], &By::Address.original_key()].concat()
}

/// Returns the fields of an endpoint, the value of maps.
pub(super) fn target() -> Vec<Selector> {
    vec![Selector::DestinationAddress, Selector::DestinationPort]
}

/// The sets that remember the clients of one namespace's services with session affinity.
///
/// Each namespace has its own sets, so that filling them affects no other namespace. They are
/// created and deleted with the chain that looks clients up (`SharedChain::Follow`).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Clients(Arc<str>);

impl Clients {
    pub fn of(namespace: &str) -> Self {
        Self(Arc::from(namespace))
    }

    pub fn namespace(&self) -> &str {
        &self.0
    }

    /// Returns a name that contains the namespace. No other name in the table contains a `/`.
    pub(super) fn name(&self, what: &str) -> Name {
        readable_name(&format!("{what}/{}", self.0))
    }

    /// Returns the map from client and frontend to endpoint, which packets fill.
    pub fn map(&self) -> Name {
        self.name("affinity")
    }

    /// Returns the set that counts packets of clients that could not be remembered, by protocol.
    pub fn forgotten(&self) -> Name {
        self.name("not-remembered")
    }

    /// Returns both sets.
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

/// Returns the declaration of [`Clients::map`]. Elements have the timeout of their service; the
/// default here is that of kube-proxy.
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

/// Returns a verdict map for a part of a packet's priority.
pub(super) fn priority_map(mut elements: Vec<Element>) -> Set {
    elements.sort_by(|a, b| a.key.cmp(&b.key));
    Set {
        elements,
        ..Set::from(Declaration::new(SetKind::VerdictMap, [Selector::Priority]))
    }
}

macro_rules! service_sets {
    ($($(#[$doc:meta])* $set:ident $name:literal $declaration:expr;)*) => {
        /// A set whose elements belong to services.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum ServiceSet {
            $($(#[$doc])* $set,)*
        }

        impl ServiceSet {
            /// All such sets.
            pub const ALL: &[ServiceSet] = &[$(ServiceSet::$set,)*];

            /// Returns the name in the table.
            pub fn name(self) -> Name {
                match self {
                    $(ServiceSet::$set => {
                        static NAME: LazyLock<Name> = LazyLock::new(|| Name::from($name));
                        NAME.clone()
                    })*
                }
            }

            /// Returns the declaration, the same in both families.
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

fn numbers(by: By) -> Declaration {
    Declaration::new(SetKind::Map(vec![Selector::Priority]), by.key())
}

fn targets(by: By) -> Declaration {
    Declaration::new(SetKind::Map(target()), by.endpoint_key())
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
    /// Frontend to a number, what happens to its packets.
    Frontends "frontends" numbers(By::Address);
    /// Frontend with external policy Local to the number of endpoints on this node.
    LocalFrontends "local-frontends" numbers(By::Address);
    /// Frontend with source ranges to the chain that looks for the client in them.
    FirewalledFrontends "firewalled-frontends" verdicts(By::Address.key());
    /// NodePort to what happens to its packets.
    NodePorts "nodeports" numbers(By::NodePort);
    /// NodePort with external policy Local to the number of endpoints on this node.
    NodePortsLocal "nodeports-local" numbers(By::NodePort);
    /// Frontend with session affinity to the chain that looks for the client.
    StickyFrontends "sticky-frontends" verdicts(By::Address.key());
    /// NodePort with session affinity to the chain that looks for the client.
    StickyNodePorts "sticky-nodeports" verdicts(By::NodePort.key());
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
