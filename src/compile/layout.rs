//! The names and declarations of the tables' sets.

use std::sync::{Arc, LazyLock};

use crate::model;
use crate::ruleset::{Declaration, Family, Name, Selector, SetKind, TableId};

/// The name of the service tables, one in the family `ip` and one in `ip6`.
pub const TABLE: &str = "nftlet";

/// The table family of an address family.
pub fn table_family(family: model::Family) -> Family {
    match family {
        model::Family::V4 => Family::Ip,
        model::Family::V6 => Family::Ip6,
    }
}

/// The service table of an address family.
pub fn table_id(family: model::Family) -> TableId {
    TableId::new(table_family(family), TABLE)
}

/// The fields that identify a frontend with an address of its own.
pub(super) fn frontend_key() -> Vec<Selector> {
    vec![
        Selector::DestinationAddress,
        Selector::L4Protocol,
        Selector::DestinationPort,
    ]
}

/// The fields that identify a NodePort.
pub(super) fn nodeport_key() -> Vec<Selector> {
    vec![Selector::L4Protocol, Selector::DestinationPort]
}

/// A frontend key and a random number below the number of endpoints.
pub(super) fn indexed(mut key: Vec<Selector>, endpoints: u32) -> Vec<Selector> {
    key.push(Selector::RandomIndex { modulus: endpoints });
    key
}

/// A set whose elements services make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ServiceSet {
    /// (frontend, index) to endpoint.
    Endpoints,
    /// (NodePort, index) to endpoint.
    NodePortEndpoints,
    /// Frontend to the chain that handles it.
    Frontends,
    /// NodePort to the chain that handles it.
    NodePorts,
    /// The ClusterIPs in use.
    ClusterIps,
    /// Pairs of an endpoint's address with itself, for endpoints that may be on this node.
    Hairpin,
}

impl ServiceSet {
    /// Every such set.
    pub const ALL: [ServiceSet; 6] = [
        ServiceSet::Endpoints,
        ServiceSet::NodePortEndpoints,
        ServiceSet::Frontends,
        ServiceSet::NodePorts,
        ServiceSet::ClusterIps,
        ServiceSet::Hairpin,
    ];

    /// The name in the table.
    pub fn name(self) -> Name {
        static NAMES: LazyLock<[Name; 6]> = LazyLock::new(|| {
            [
                "endpoints",
                "nodeport-endpoints",
                "frontends",
                "nodeports",
                "cluster-ips",
                "hairpin",
            ]
            .map(Name::from)
        });
        self.pick(&NAMES)
    }

    /// The declaration, the same in both families.
    pub fn declaration(self) -> Arc<Declaration> {
        static DECLARATIONS: LazyLock<[Arc<Declaration>; 6]> = LazyLock::new(|| {
            let target = || {
                SetKind::Map(vec![
                    Selector::DestinationAddress,
                    Selector::DestinationPort,
                ])
            };
            [
                Declaration::new(target(), indexed(frontend_key(), 1)),
                Declaration::new(target(), indexed(nodeport_key(), 1)),
                Declaration::new(SetKind::VerdictMap, frontend_key()),
                Declaration::new(SetKind::VerdictMap, nodeport_key()),
                Declaration::new(SetKind::Set, [Selector::DestinationAddress]),
                Declaration::new(
                    SetKind::Set,
                    [Selector::SourceAddress, Selector::DestinationAddress],
                ),
            ]
            .map(Arc::new)
        });
        self.pick(&DECLARATIONS)
    }

    fn pick<T: Clone>(self, [a, b, c, d, e, f]: &[T; 6]) -> T {
        match self {
            ServiceSet::Endpoints => a,
            ServiceSet::NodePortEndpoints => b,
            ServiceSet::Frontends => c,
            ServiceSet::NodePorts => d,
            ServiceSet::ClusterIps => e,
            ServiceSet::Hairpin => f,
        }
        .clone()
    }
}
