//! The values that a rule reads from a packet or its connection.

use std::fmt::Write;

use super::key::FieldType;
use super::name::TableFamily;

/// A value read from the packet, its metadata or its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Selector {
    /// `ip saddr` or `ip6 saddr`.
    SourceAddress,
    /// `ip daddr` or `ip6 daddr`.
    DestinationAddress,
    /// `meta l4proto`.
    L4Protocol,
    /// `th dport`.
    DestinationPort,
    /// `meta priority`.
    Priority,
    /// `iifname`.
    InputInterface,
    /// `oifname`.
    OutputInterface,
    /// `ct original ip daddr`: the destination before DNAT.
    OriginalDestinationAddress,
    /// `ct original proto-dst`: the destination port before DNAT. nft accepts it only after a match
    /// of `meta l4proto`.
    OriginalDestinationPort,
    /// `icmpv6 type`. nft accepts it only after a match of `meta l4proto ipv6-icmp`.
    Icmp6Type,
}

impl Selector {
    /// Returns the type of the value.
    pub fn field_type(self, family: TableFamily) -> FieldType {
        match self {
            Selector::SourceAddress
            | Selector::DestinationAddress
            | Selector::OriginalDestinationAddress => match family {
                TableFamily::Ip => FieldType::Ipv4Addr,
                TableFamily::Ip6 => FieldType::Ipv6Addr,
            },
            Selector::L4Protocol => FieldType::InetProto,
            Selector::DestinationPort | Selector::OriginalDestinationPort => FieldType::InetService,
            Selector::Priority => FieldType::ClassId,
            Selector::InputInterface | Selector::OutputInterface => FieldType::IfName,
            Selector::Icmp6Type => FieldType::Icmp6Type,
        }
    }

    /// Returns the selector in the syntax of nft.
    pub fn text(self, family: TableFamily) -> String {
        let ip = family.keyword();
        match self {
            Selector::SourceAddress => format!("{ip} saddr"),
            Selector::DestinationAddress => format!("{ip} daddr"),
            Selector::L4Protocol => "meta l4proto".into(),
            Selector::DestinationPort => "th dport".into(),
            Selector::Priority => "meta priority".into(),
            Selector::InputInterface => "iifname".into(),
            Selector::OutputInterface => "oifname".into(),
            Selector::OriginalDestinationAddress => format!("ct original {ip} daddr"),
            Selector::OriginalDestinationPort => "ct original proto-dst".into(),
            Selector::Icmp6Type => "icmpv6 type".into(),
        }
    }
}

/// Returns a concatenation of selectors in the syntax of nft.
pub(super) fn concatenation(selectors: &[Selector], family: TableFamily) -> String {
    let mut text = String::new();
    for (index, selector) in selectors.iter().enumerate() {
        if index > 0 {
            text.push_str(" . ");
        }
        // Writing to a String cannot fail.
        let _ = write!(text, "{}", selector.text(family));
    }
    text
}
