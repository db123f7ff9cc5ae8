//! Names and declarations of the policy tables.

use std::sync::{Arc, LazyLock};

use crate::engine::table_family;
use crate::model::{self, ObjectName};
use crate::nft::{Declaration, Hook, Name, Selector, SetKind, TableId, readable_name};

/// The name of the policy tables, one in the family `ip` and one in `ip6`.
///
/// They are separate from the service tables because a change of a rule or verdict makes the kernel
/// validate the whole table.
pub const TABLE: &str = "nftlet-policy";

/// Returns the policy table of an address family.
pub fn table_id(family: model::Family) -> TableId {
    TableId::new(table_family(family), TABLE)
}

/// The direction of traffic, seen from the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// To the pod.
    Ingress,
    /// From the pod.
    Egress,
}

impl Direction {
    /// Both directions.
    pub const ALL: [Direction; 2] = [Direction::Ingress, Direction::Egress];

    /// Returns the word for it in names, metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Direction::Ingress => "ingress",
            Direction::Egress => "egress",
        }
    }

    /// Returns the field of a packet with the isolated pod's address.
    pub(super) fn pod(self) -> Selector {
        match self {
            Direction::Ingress => Selector::DestinationAddress,
            Direction::Egress => Selector::SourceAddress,
        }
    }

    /// Returns the field of a packet with the peer's address.
    pub(super) fn peer(self) -> Selector {
        match self {
            Direction::Ingress => Selector::SourceAddress,
            Direction::Egress => Selector::DestinationAddress,
        }
    }

    /// Returns the interface of a packet that leads to the isolated pod.
    pub(super) fn link(self) -> Selector {
        match self {
            Direction::Ingress => Selector::OutputInterface,
            Direction::Egress => Selector::InputInterface,
        }
    }

    /// Returns the set of interfaces that lead to isolated pods.
    pub(super) fn links(self) -> Name {
        Name::from(match self {
            Direction::Ingress => "ingress-links",
            Direction::Egress => "egress-links",
        })
    }

    /// Returns the verdict map from isolated addresses to the chains of their profiles, for a holder of an
    /// address by its place (layer).
    pub(super) fn pods(self, layer: usize) -> Name {
        layered(
            match self {
                Direction::Ingress => "ingress-pods",
                Direction::Egress => "egress-pods",
            },
            layer,
        )
    }

    /// Returns the chain that denies.
    pub(super) fn deny(self) -> Name {
        Name::from(match self {
            Direction::Ingress => "deny-ingress",
            Direction::Egress => "deny-egress",
        })
    }

    /// Returns the chain that drops what cluster policies deny.
    pub(super) fn deny_cluster(self) -> Name {
        Name::from(match self {
            Direction::Ingress => "deny-cluster-ingress",
            Direction::Egress => "deny-cluster-egress",
        })
    }

    /// Returns the chain for what audited policies would deny.
    pub(super) fn audit(self) -> Name {
        Name::from(match self {
            Direction::Ingress => "audit-ingress",
            Direction::Egress => "audit-egress",
        })
    }

    /// Returns the set that counts, by pod address, what the audited policies of a profile would deny.
    pub(super) fn audited(self, digest: &str) -> Name {
        Name::from(match self {
            Direction::Ingress => format!("audited-ingress-{digest}"),
            Direction::Egress => format!("audited-egress-{digest}"),
        })
    }

    /// Returns the set that counts denied packets by pod address.
    pub fn denied(self) -> Name {
        Name::from(match self {
            Direction::Ingress => "denied-ingress",
            Direction::Egress => "denied-egress",
        })
    }

    /// Returns the chain of the isolated pods whose profile has a digest.
    pub(super) fn pods_chain(self, digest: &str) -> Name {
        Name::from(match self {
            Direction::Ingress => format!("pods-ingress-{digest}"),
            Direction::Egress => format!("pods-egress-{digest}"),
        })
    }

    /// Returns the chain of the cluster policies of a tier whose list has a digest.
    pub(super) fn tier_chain(self, tier: &str, digest: &str) -> Name {
        Name::from(format!("{tier}-{}-{digest}", self.as_str()))
    }

    pub(super) fn policy_chain(self, policy: &ObjectName) -> Name {
        readable_name(&match self {
            Direction::Ingress => format!("policy-ingress-{policy}"),
            Direction::Egress => format!("policy-egress-{policy}"),
        })
    }
}

/// Returns a name for a layer; the first layer has no suffix.
pub(super) fn layered(name: &str, layer: usize) -> Name {
    match layer {
        0 => Name::from(name),
        _ => Name::from(format!("{name}-{}", layer.saturating_add(1))),
    }
}

/// ICMPv6 messages that no policy applies to, because hosts on a link cannot be reached without
/// them. The hop limit proves that they come from the link: a router decrements it.
pub(super) struct Exempt {
    /// The name of the set of their types.
    pub set: &'static str,
    pub types: &'static [u8],
    /// The hop limit with which they are sent.
    pub hop_limit: u8,
}

/// Neighbour and router discovery, and multicast listeners.
pub(super) const EXEMPT: [Exempt; 2] = [
    Exempt {
        set: "neighbour-discovery",
        types: &[133, 134, 135, 136],
        hop_limit: 255,
    },
    Exempt {
        set: "multicast-listeners",
        types: &[130, 131, 132, 143],
        hop_limit: 1,
    },
];

/// The set of all isolated addresses, for strict mode.
pub(super) const ISOLATED: &str = "isolated-pods";
/// The set of each isolated address with itself, which the chains of pods accept without naming an
/// address.
pub(super) const TO_ITSELF: &str = "to-itself";

/// Returns the key of [`TO_ITSELF`].
pub(super) fn ends_key() -> Vec<Selector> {
    vec![Selector::SourceAddress, Selector::DestinationAddress]
}

/// Returns the key of a port of a destination pod.
pub(super) fn port_key() -> Vec<Selector> {
    vec![
        Selector::DestinationAddress,
        Selector::L4Protocol,
        Selector::DestinationPort,
    ]
}

macro_rules! declarations {
    ($($(#[$doc:meta])* $name:ident $declaration:expr;)*) => {
        $($(#[$doc])*
        pub(super) fn $name() -> Arc<Declaration> {
            static DECLARATION: LazyLock<Arc<Declaration>> =
                LazyLock::new(|| Arc::new($declaration));
            DECLARATION.clone()
        })*
    };
}

declarations! {
    /// Verdict map from address to the chain of its profile.
    pods Declaration::new(SetKind::VerdictMap, [Selector::SourceAddress]);
    /// Addresses with counters.
    counted Declaration {
        counter: true,
        ..Declaration::new(SetKind::Set, [Selector::SourceAddress])
    };
    /// Addresses.
    addresses Declaration::new(SetKind::Set, [Selector::SourceAddress]);
    /// Ranges of addresses.
    networks Declaration {
        interval: true,
        ..Declaration::new(SetKind::Set, [Selector::SourceAddress])
    };
    /// Source and destination.
    ends Declaration::new(SetKind::Set, ends_key());
    /// Names of interfaces.
    links Declaration::new(SetKind::Set, [Selector::InputInterface]);
    /// ICMPv6 types.
    icmp6_types Declaration::new(SetKind::Set, [Selector::Icmp6Type]);
}

/// The base chain for what is forwarded.
pub(super) const STARTUP: &str = "startup";
/// The base chains that close the pod network, with their hooks. The last one is for packets that IPVS of another proxy sends
/// past the forward hook.
pub(super) const STARTUP_BASES: [(&str, Hook); 3] = [
    (STARTUP, Hook::Forward),
    ("startup-to-node", Hook::Input),
    ("startup-by-ipvs", Hook::Output),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(name: &str) -> String {
        Direction::Ingress
            .policy_chain(&ObjectName::new("shop", name))
            .to_string()
    }

    #[test]
    fn names_are_those_of_the_objects_where_nft_can_read_them() {
        assert_eq!(chain("web-0.a"), "policy-ingress-shop/web-0.a");
        for odd in ["a{drop}", "a;b", "a\"b", "a_b", "a#b", "a$b"] {
            let name = chain(odd);
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
            assert!(name.chars().all(plain), "{name}");
            assert!(name.contains('_'), "{name}");
        }
        assert_ne!(chain("a{b"), chain("a}b"));
    }

    #[test]
    fn long_names_fit_and_are_distinct() {
        let long = "x".repeat(253);
        let other = format!("{}y", "x".repeat(252));
        assert!(chain(&long).len() <= 255);
        assert_ne!(chain(&long), chain(&other));
    }
}
