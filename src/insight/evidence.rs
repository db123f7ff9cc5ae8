//! What an answer says of chains, elements and the kernel.

use std::net::{IpAddr, SocketAddr};

use serde::{Serialize, Serializer};

use crate::nft::{Key, Name, RulesetPart, TableId};
use crate::policies::Direction;

/// A chain, or an element of a set or map.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct RuleName {
    pub part: RulesetPart,
    /// Whether the kernel has it; none if it was not compared.
    pub in_kernel: Option<bool>,
}

/// A chain or an element as people and programs read it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Row {
    /// Family and name of the table.
    pub table: String,
    /// The kind and the name of the chain, set or map.
    pub object: String,
    /// The element in the syntax of nft.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub element: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_kernel: Option<bool>,
}

impl RuleName {
    /// Returns it as text, which takes longer than to find it.
    pub(super) fn row(&self) -> Row {
        Row {
            table: self.part.table().to_string(),
            object: self.part.object(),
            element: self.part.element(),
            in_kernel: self.in_kernel,
        }
    }
}

impl Serialize for RuleName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.row().serialize(serializer)
    }
}

/// What else the kernel knows of the connections of an answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Subjects {
    pub pairs: Vec<Pair>,
    pub counters: Vec<Counter>,
}

/// A client and the destination that it connects to, before any translation.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Pair {
    pub client: IpAddr,
    pub destination: IpAddr,
    /// The IP protocol number.
    pub protocol: u8,
    pub port: Option<u16>,
    /// The element that remembers the endpoint of the client, with session affinity.
    pub affinity: Option<ElementKey>,
}

/// The element that counts what a pod is denied.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Counter {
    pub pod: String,
    pub direction: Direction,
    pub at: ElementKey,
}

/// Table, set and key of an element.
pub(crate) type ElementKey = (TableId, Name, Key);

/// What the kernel says of the connections of an answer.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Live {
    /// The chains and elements that are too many to be compared.
    pub not_compared: usize,
    /// The changes of objects that are not yet in the rules.
    pub changes_waiting: usize,
    /// The endpoint to which the first client is bound.
    pub affinity: Option<Affinity>,
    /// None if the question is about too many clients and destinations, or with a warning.
    pub connections: Option<Connections>,
    /// The packets that policies of this node denied.
    pub drops: Vec<Drops>,
}

/// An endpoint to which session affinity binds a client.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Affinity {
    pub client: IpAddr,
    pub endpoint: SocketAddr,
    /// The time after which the client is forgotten, unless it connects again.
    pub expires_seconds: u64,
}

/// The tracked connections between the ends of an answer.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Connections {
    pub count: usize,
    /// The first of them.
    pub shown: Vec<TrackedConnection>,
}

/// A tracked connection.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct TrackedConnection {
    pub state: &'static str,
    pub client: String,
    /// Where the replies come from.
    pub endpoint: String,
}

/// What a pod was denied in one direction since it is isolated.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Drops {
    pub pod: String,
    pub direction: &'static str,
    pub packets: u64,
}
