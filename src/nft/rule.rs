//! Rules and the statements they are made of.

use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use super::name::{Name, clean_comment};
use super::selector::Selector;

/// A rule: statements that are evaluated in order until one does not match or issues a verdict.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Rule {
    /// The statements, shared by all clones of the rule.
    pub statements: Arc<[Statement]>,
    /// A comment for the reader of the ruleset.
    pub comment: Option<Arc<str>>,
}

impl Rule {
    /// Creates a rule without a comment.
    pub fn new(statements: impl Into<Arc<[Statement]>>) -> Self {
        Self {
            statements: statements.into(),
            comment: None,
        }
    }

    /// Sets the comment.
    #[must_use]
    pub fn comment(mut self, comment: &str) -> Self {
        self.comment = Some(clean_comment(comment));
        self
    }
}

/// A comparison operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Comparison {
    /// Equal, or inside the prefix.
    Is,
    /// Different, or outside the prefix.
    IsNot,
}

/// The constant that a selector is compared with.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Operand {
    /// An address prefix, for the address selectors.
    Network(IpNet),
    /// An IP protocol number, for [`Selector::L4Protocol`].
    Protocol(u8),
    /// A port, for the port selectors.
    Port(u16),
    /// A range of ports from the first to the last, for the port selectors. The last is not
    /// below the first.
    Ports(u16, u16),
    /// An interface name, for the interface selectors.
    Interface(Arc<str>),
    /// The beginning of an interface name (`veth*`).
    InterfacePrefix(Arc<str>),
}

/// A conntrack state (`ct state`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CtState {
    /// A packet that belongs to no connection.
    Invalid,
    /// A packet of a known connection.
    Established,
    /// A packet that a known connection caused, such as an ICMP error.
    Related,
    /// The first packet of a connection.
    New,
}

impl CtState {
    const ALL: [CtState; 4] = [
        CtState::Invalid,
        CtState::Established,
        CtState::Related,
        CtState::New,
    ];

    fn bit(self) -> u8 {
        1 << self as u8
    }
}

/// A set of conntrack states.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CtStates(u8);

impl CtStates {
    /// Returns the states in the order of nft.
    pub fn iter(self) -> impl Iterator<Item = CtState> {
        let states = CtState::ALL.into_iter();
        states.filter(move |state| self.0 & state.bit() != 0)
    }
}

impl From<CtState> for CtStates {
    fn from(state: CtState) -> Self {
        Self(state.bit())
    }
}

impl<const N: usize> From<[CtState; N]> for CtStates {
    fn from(states: [CtState; N]) -> Self {
        Self(states.iter().fold(0, |bits, state| bits | state.bit()))
    }
}

/// A conntrack status bit (`ct status`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CtStatus {
    /// The destination was translated.
    Dnat,
}

/// The answer to a rejected packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RejectWith {
    /// A TCP reset. The rule must have matched the protocol before.
    TcpReset,
    /// ICMP (or ICMPv6) port unreachable.
    PortUnreachable,
    /// ICMP (or ICMPv6) communication administratively prohibited.
    AdminProhibited,
}

/// A verdict on a packet.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Verdict {
    /// Leave the base chain; other base chains of the hook still see the packet.
    Accept,
    /// Discard the packet.
    Drop,
    /// Go back to the calling chain.
    Return,
    /// Continue in a chain and return after its end.
    Jump(Name),
    /// Continue in a chain without returning to this one.
    Goto(Name),
}

impl Verdict {
    /// Returns the chain that it leads to.
    pub fn target(&self) -> Option<&Name> {
        match self {
            Verdict::Jump(chain) | Verdict::Goto(chain) => Some(chain),
            Verdict::Accept | Verdict::Drop | Verdict::Return => None,
        }
    }
}

/// One statement of a rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Statement {
    /// Continue if the comparison of a selector with a constant holds.
    Match(Selector, Comparison, Operand),
    /// Continue if all these bits of `meta mark` are set.
    MarkBits(u32),
    /// Continue if the connection is in one of the states, at least one.
    CtState(CtStates),
    /// Continue if the connection has the status.
    CtStatus(CtStatus),
    /// Continue if a TCP segment does not open a connection: of the flags FIN, SYN, RST and ACK it
    /// has others than SYN alone. The rule must have matched the protocol before.
    TcpNotOpening,
    /// Continue if the packet has this hop limit (`ip6 hoplimit`, `ip ttl`).
    HopLimit(u8),
    /// Continue up to a rate (`limit rate`), which all packets that reach the rule share.
    Limit {
        /// The average number of packets per second, at least 1.
        per_second: u32,
        /// The number of packets that may exceed the rate after a pause, at least 1.
        burst: u32,
    },
    /// Send a copy of the packet to an NFLOG group, and continue.
    Log {
        /// A text for the listener, in the form that [`Statement::log`] ensures.
        prefix: Arc<str>,
        /// The group.
        group: u16,
        /// The number of bytes to copy, from the network header on; 0 for all.
        snaplen: u32,
    },
    /// Continue if the destination is an address of this host (`fib daddr type local`).
    DestinationIsLocal,
    /// Continue if the destination is a broadcast address, also one of a connected network
    /// (`fib daddr type broadcast`).
    DestinationIsBroadcast,
    /// Continue if the source is an address of this host (`fib saddr type local`).
    SourceIsLocal,
    /// Continue if the key is (or is not) an element of the set.
    InSet(Vec<Selector>, Comparison, Name),
    /// Issue the verdict of the key in the map; without an element continue.
    VerdictMap(Vec<Selector>, Name),
    /// Translate the destination to the address and port of the key in the map; without an element
    /// the rule does not match.
    DnatByMap(Vec<Selector>, Name),
    /// Set bits of `meta mark`.
    SetMarkBits(u32),
    /// Invert bits of `meta mark`.
    FlipMarkBits(u32),
    /// Set `meta priority` to the value of the key in the map; without an element the rule does not
    /// match.
    PriorityByMap(Vec<Selector>, Name),
    /// Issue the verdict that the map has for these bits of `meta priority`; without an element
    /// continue.
    PriorityVerdict {
        /// The bits; the others count as 0.
        mask: u32,
        /// The map.
        map: Name,
    },
    /// Set `meta priority` to a constant.
    SetPriority(u32),
    /// Set `meta priority` to a uniform random number from 1 to a largest one, at least 1.
    RandomPriority(u32),
    /// Add or refresh an element of a dynamic map.
    UpdateMap {
        /// The map.
        map: Name,
        /// The key of the element.
        key: Vec<Selector>,
        /// The time after which it expires without a refresh.
        timeout: Duration,
        /// Its value.
        data: Vec<Selector>,
    },
    /// Translate the source to the address of the outgoing interface, with random ports.
    Masquerade,
    /// Reject the packet.
    Reject(RejectWith),
    /// Count packets and bytes.
    Counter,
    /// Issue a verdict.
    Verdict(Verdict),
    /// A statement read from the kernel that nftlet did not write, in libnftnl's notation. It is
    /// compared and printed, never written.
    Foreign(Arc<str>),
}

impl Statement {
    /// Returns a [`Statement::Log`] whose prefix nft can read: a quoted string has no escapes, `$`
    /// starts a variable, and the kernel stores at most 127 bytes.
    pub fn log(prefix: &str, group: u16, snaplen: u32) -> Self {
        Statement::Log {
            prefix: clean_comment(&prefix.replace('$', "?")),
            group,
            snaplen,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_a_set() {
        let states = CtStates::from([CtState::New, CtState::Established, CtState::New]);
        let listed: Vec<_> = states.iter().collect();
        assert_eq!(listed, [CtState::Established, CtState::New]);
        assert_eq!(states, [CtState::Established, CtState::New].into());
        assert_ne!(states, CtState::New.into());
    }

    #[test]
    fn a_log_prefix_is_what_nft_can_read() {
        let Statement::Log { prefix, .. } = Statement::log("\"a\" $b", 1, 0) else {
            panic!("not a log statement");
        };
        assert_eq!(&*prefix, "?a? ?b");
    }
}
