//! The four iptables of a host.

use std::fmt;

use crate::nft::TableFamily;

/// A variant of iptables. The two do not see each other's rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Variant {
    /// Has tables of its own in the kernel.
    Legacy,
    /// Writes nftables.
    Nft,
}

/// A variant of iptables for a family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Iptables {
    pub(super) variant: Variant,
    pub(super) family: TableFamily,
}

impl Iptables {
    pub(super) const ALL: [Self; 4] = [
        Self::new(Variant::Nft, TableFamily::Ip),
        Self::new(Variant::Nft, TableFamily::Ip6),
        Self::new(Variant::Legacy, TableFamily::Ip),
        Self::new(Variant::Legacy, TableFamily::Ip6),
    ];

    const fn new(variant: Variant, family: TableFamily) -> Self {
        Self { variant, family }
    }

    /// Returns the names that a program of it may have, such as `iptables-nft-save`, and
    /// `iptables-save`, which may be of either variant.
    pub(super) fn program_names(self, action: &str) -> [String; 2] {
        [
            format!("{self}-{action}"),
            format!("{}-{action}", self.family_name()),
        ]
    }

    fn family_name(self) -> &'static str {
        match self.family {
            TableFamily::Ip => "iptables",
            TableFamily::Ip6 => "ip6tables",
        }
    }
}

impl fmt::Display for Iptables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let variant = match self.variant {
            Variant::Legacy => "legacy",
            Variant::Nft => "nft",
        };
        write!(f, "{}-{variant}", self.family_name())
    }
}
