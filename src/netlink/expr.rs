//! Translates statements to the kernel's expressions, as plain data.
//!
//! The kernel evaluates a rule as a list of expressions over sixteen 32-bit registers. Selectors load
//! values into registers, in sequence for a concatenated key (`load`). Comparisons and lookups read
//! them. `ffi` converts the list to libnftnl objects.

mod load;

use std::ffi::CStr;
use std::net::IpAddr;

use nftnl::nftnl_sys as sys;

use super::uapi;
use crate::nft::{
    Comparison, CtState, CtStatus, FieldType, Name, Operand, RejectWith, Rule, Selector, Statement,
    TableFamily, Verdict,
};

/// One expression: its name and the attributes to set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Expr {
    /// Its name in libnftnl.
    pub name: &'static CStr,
    /// Attribute numbers with their values.
    pub attributes: Vec<(u32, Attribute)>,
}

/// The value of an expression's attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Attribute {
    /// One byte.
    U8(u8),
    /// A number in host byte order, which libnftnl converts.
    U16(u16),
    /// A number in host byte order, which libnftnl converts.
    U32(u32),
    /// A number in host byte order, which libnftnl converts.
    U64(u64),
    Text(Name),
    /// Raw bytes.
    Bytes(Vec<u8>),
}

/// Error for a statement that was read from the kernel and cannot be encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unwritable;

const VERDICT_REGISTER: u32 = libc::NFT_REG_VERDICT as u32;

/// Returns the number of the register at a 32-bit word. The kernel numbers registers at multiples of
/// four words 1 to 4, and the others from 8.
fn register(word: usize) -> u32 {
    let word = word as u32;
    if word.is_multiple_of(4) {
        libc::NFT_REG_1 as u32 + word / 4
    } else {
        libc::NFT_REG32_00 as u32 + word
    }
}

/// The expressions of one rule, under construction.
pub(crate) struct Program {
    family: TableFamily,
    exprs: Vec<Expr>,
}

impl Program {
    /// Translates a rule of a table of the given family.
    ///
    /// # Errors
    ///
    /// [`Unwritable`] for a rule with a foreign statement.
    pub(crate) fn rule(rule: &Rule, family: TableFamily) -> Result<Vec<Expr>, Unwritable> {
        let mut program = Program {
            family,
            exprs: Vec::new(),
        };
        for statement in &*rule.statements {
            program.statement(statement)?;
        }
        Ok(program.exprs)
    }

    fn push<const N: usize>(&mut self, name: &'static CStr, attributes: [(u32, Attribute); N]) {
        self.exprs.push(Expr {
            name,
            attributes: attributes.into(),
        });
    }

    fn bitwise(&mut self, mask: Vec<u8>, xor: Vec<u8>) {
        use Attribute::{Bytes, U32};
        self.push(
            c"bitwise",
            [
                (sys::NFTNL_EXPR_BITWISE_SREG, U32(register(0))),
                (sys::NFTNL_EXPR_BITWISE_DREG, U32(register(0))),
                (sys::NFTNL_EXPR_BITWISE_LEN, U32(mask.len() as u32)),
                (sys::NFTNL_EXPR_BITWISE_MASK, Bytes(mask)),
                (sys::NFTNL_EXPR_BITWISE_XOR, Bytes(xor)),
            ],
        );
    }

    fn cmp(&mut self, comparison: Comparison, value: Vec<u8>) {
        let op = match comparison {
            Comparison::Is => libc::NFT_CMP_EQ,
            Comparison::IsNot => libc::NFT_CMP_NEQ,
        };
        self.cmp_by(op, value);
    }

    /// Compares the register at word 0 by one of the kernel's operators.
    fn cmp_by(&mut self, op: libc::c_int, value: Vec<u8>) {
        use Attribute::{Bytes, U32};
        self.push(
            c"cmp",
            [
                (sys::NFTNL_EXPR_CMP_SREG, U32(register(0))),
                (sys::NFTNL_EXPR_CMP_OP, U32(op as u32)),
                (sys::NFTNL_EXPR_CMP_DATA, Bytes(value)),
            ],
        );
    }

    /// Compares the register at word 0 with a range. Like nft, encodes inclusion as two bounds and
    /// exclusion as one range.
    fn range(&mut self, comparison: Comparison, from: Vec<u8>, to: Vec<u8>) {
        use Attribute::{Bytes, U32};
        match comparison {
            Comparison::Is => {
                self.cmp_by(libc::NFT_CMP_GTE, from);
                self.cmp_by(libc::NFT_CMP_LTE, to);
            }
            Comparison::IsNot => self.push(
                c"range",
                [
                    (sys::NFTNL_EXPR_RANGE_SREG, U32(register(0))),
                    (sys::NFTNL_EXPR_RANGE_OP, U32(libc::NFT_RANGE_NEQ as u32)),
                    (sys::NFTNL_EXPR_RANGE_FROM_DATA, Bytes(from)),
                    (sys::NFTNL_EXPR_RANGE_TO_DATA, Bytes(to)),
                ],
            ),
        }
    }

    /// Matches if the register at word 0 has any of the bits.
    fn any_bit(&mut self, bits: u32) {
        self.bitwise(bits.to_ne_bytes().into(), vec![0; 4]);
        self.cmp(Comparison::IsNot, vec![0; 4]);
    }

    fn lookup(&mut self, set: &Name, result: Option<u32>, inverted: bool) {
        use Attribute::{Text, U32};
        let mut attributes = vec![
            (sys::NFTNL_EXPR_LOOKUP_SREG, U32(register(0))),
            (sys::NFTNL_EXPR_LOOKUP_SET, Text(set.clone())),
        ];
        if let Some(result) = result {
            attributes.push((sys::NFTNL_EXPR_LOOKUP_DREG, U32(result)));
        }
        if inverted {
            let flag = libc::NFT_LOOKUP_F_INV as u32;
            attributes.push((sys::NFTNL_EXPR_LOOKUP_FLAGS, U32(flag)));
        }
        self.exprs.push(Expr {
            name: c"lookup",
            attributes,
        });
    }

    /// Compares the type of an address in the routing table.
    fn address_type(&mut self, flag: u32, wanted: u8) {
        use Attribute::U32;
        self.push(
            c"fib",
            [
                (sys::NFTNL_EXPR_FIB_DREG, U32(register(0))),
                (
                    sys::NFTNL_EXPR_FIB_RESULT,
                    U32(uapi::NFT_FIB_RESULT_ADDRTYPE),
                ),
                (sys::NFTNL_EXPR_FIB_FLAGS, U32(flag)),
            ],
        );
        self.cmp(Comparison::Is, u32::from(wanted).to_ne_bytes().into());
    }

    /// Stores the register at word 0 in a field of the packet's metadata.
    fn set_meta(&mut self, key: libc::c_int) {
        use Attribute::U32;
        self.push(
            c"meta",
            [
                (sys::NFTNL_EXPR_META_KEY, U32(key as u32)),
                (sys::NFTNL_EXPR_META_SREG, U32(register(0))),
            ],
        );
    }

    fn compare(&mut self, selector: Selector, comparison: Comparison, operand: &Operand) {
        self.load(selector, 0);
        match operand {
            Operand::Network(net) => {
                let (value, mask) = match (net.network(), net.netmask()) {
                    (IpAddr::V4(value), IpAddr::V4(mask)) => {
                        (value.octets().to_vec(), mask.octets().to_vec())
                    }
                    (IpAddr::V6(value), IpAddr::V6(mask)) => {
                        (value.octets().to_vec(), mask.octets().to_vec())
                    }
                    // A network and its mask are always of one family.
                    _ => return,
                };
                if net.prefix_len() < net.max_prefix_len() {
                    let zeros = vec![0; mask.len()];
                    self.bitwise(mask, zeros);
                }
                self.cmp(comparison, value);
            }
            Operand::Protocol(number) => self.cmp(comparison, vec![*number]),
            Operand::Port(port) => self.cmp(comparison, port.to_be_bytes().into()),
            Operand::Ports(from, to) => self.range(
                comparison,
                from.to_be_bytes().into(),
                to.to_be_bytes().into(),
            ),
            Operand::Interface(name) => {
                let mut padded = name.as_bytes().to_vec();
                padded.resize(FieldType::IfName.bytes(), 0);
                self.cmp(comparison, padded);
            }
            // Comparing fewer bytes than the register holds matches the beginning.
            Operand::InterfacePrefix(prefix) => self.cmp(comparison, prefix.as_bytes().into()),
        }
    }

    fn verdict(&mut self, verdict: &Verdict) {
        use Attribute::{Text, U32};
        let mut attributes = vec![
            (sys::NFTNL_EXPR_IMM_DREG, U32(VERDICT_REGISTER)),
            (
                sys::NFTNL_EXPR_IMM_VERDICT,
                U32(verdict_code(verdict) as u32),
            ),
        ];
        if let Some(chain) = verdict.target() {
            attributes.push((sys::NFTNL_EXPR_IMM_CHAIN, Text(chain.clone())));
        }
        self.exprs.push(Expr {
            name: c"immediate",
            attributes,
        });
    }

    fn statement(&mut self, statement: &Statement) -> Result<(), Unwritable> {
        use Attribute::{Text, U8, U16, U32, U64};
        match statement {
            Statement::Match(selector, comparison, operand) => {
                self.compare(*selector, *comparison, operand);
            }
            Statement::MarkBits(bits) => {
                self.meta(libc::NFT_META_MARK, register(0));
                self.bitwise(bits.to_ne_bytes().into(), vec![0; 4]);
                self.cmp(Comparison::Is, bits.to_ne_bytes().into());
            }
            Statement::CtState(states) => {
                self.ct(libc::NFT_CT_STATE, None, register(0));
                self.any_bit(
                    states
                        .iter()
                        .fold(0, |bits, state| bits | ct_state_bit(state)),
                );
            }
            Statement::CtStatus(status) => {
                self.ct(libc::NFT_CT_STATUS, None, register(0));
                self.any_bit(ct_status_bit(*status));
            }
            Statement::TcpNotOpening => {
                // Offset of the flags in the TCP header, and the bits of the flags.
                const FLAGS_OFFSET: u32 = 13;
                const SYN: u8 = 0x02;
                const FIN_SYN_RST_ACK: u8 = 0x17;
                let base = libc::NFT_PAYLOAD_TRANSPORT_HEADER;
                self.payload(base, FLAGS_OFFSET, 1, register(0));
                self.bitwise(vec![FIN_SYN_RST_ACK], vec![0]);
                self.cmp(Comparison::IsNot, vec![SYN]);
            }
            Statement::HopLimit(hops) => {
                let offset = match self.family {
                    TableFamily::Ip => 8,
                    TableFamily::Ip6 => 7,
                };
                self.payload(libc::NFT_PAYLOAD_NETWORK_HEADER, offset, 1, register(0));
                self.cmp(Comparison::Is, vec![*hops]);
            }
            Statement::Limit { per_second, burst } => self.push(
                c"limit",
                [
                    (sys::NFTNL_EXPR_LIMIT_RATE, U64((*per_second).into())),
                    // The unit in seconds.
                    (sys::NFTNL_EXPR_LIMIT_UNIT, U64(1)),
                    (sys::NFTNL_EXPR_LIMIT_BURST, U32(*burst)),
                    (sys::NFTNL_EXPR_LIMIT_TYPE, U32(libc::NFT_LIMIT_PKTS as u32)),
                    (sys::NFTNL_EXPR_LIMIT_FLAGS, U32(0)),
                ],
            ),
            Statement::Log {
                prefix,
                group,
                snaplen,
            } => {
                let mut attributes = vec![
                    (sys::NFTNL_EXPR_LOG_PREFIX, Text(Name::from(&**prefix))),
                    (sys::NFTNL_EXPR_LOG_GROUP, U16(*group)),
                ];
                if *snaplen > 0 {
                    attributes.push((sys::NFTNL_EXPR_LOG_SNAPLEN, U32(*snaplen)));
                }
                self.exprs.push(Expr {
                    name: c"log",
                    attributes,
                });
            }
            Statement::DestinationIsLocal => {
                self.address_type(uapi::NFTA_FIB_F_DADDR, libc::RTN_LOCAL);
            }
            Statement::DestinationIsBroadcast => {
                self.address_type(uapi::NFTA_FIB_F_DADDR, libc::RTN_BROADCAST);
            }
            Statement::SourceIsLocal => {
                self.address_type(uapi::NFTA_FIB_F_SADDR, libc::RTN_LOCAL);
            }
            Statement::InSet(key, comparison, set) => {
                self.load_key(key, 0);
                self.lookup(set, None, *comparison == Comparison::IsNot);
            }
            Statement::VerdictMap(key, map) => {
                self.load_key(key, 0);
                self.lookup(map, Some(VERDICT_REGISTER), false);
            }
            Statement::DnatByMap(key, map) => {
                self.load_key(key, 0);
                self.lookup(map, Some(register(0)), false);
                let (family, words) = match self.family {
                    TableFamily::Ip => (libc::NFPROTO_IPV4, 1),
                    TableFamily::Ip6 => (libc::NFPROTO_IPV6, 4),
                };
                self.push(
                    c"nat",
                    [
                        (sys::NFTNL_EXPR_NAT_TYPE, U32(libc::NFT_NAT_DNAT as u32)),
                        (sys::NFTNL_EXPR_NAT_FAMILY, U32(family as u32)),
                        (sys::NFTNL_EXPR_NAT_REG_ADDR_MIN, U32(register(0))),
                        (sys::NFTNL_EXPR_NAT_REG_PROTO_MIN, U32(register(words))),
                    ],
                );
            }
            Statement::SetMarkBits(bits) => {
                self.meta(libc::NFT_META_MARK, register(0));
                self.bitwise((!bits).to_ne_bytes().into(), bits.to_ne_bytes().into());
                self.set_meta(libc::NFT_META_MARK);
            }
            Statement::FlipMarkBits(bits) => {
                self.meta(libc::NFT_META_MARK, register(0));
                self.bitwise(vec![0xff; 4], bits.to_ne_bytes().into());
                self.set_meta(libc::NFT_META_MARK);
            }
            Statement::PriorityByMap(key, map) => {
                self.load_key(key, 0);
                self.lookup(map, Some(register(0)), false);
                self.set_meta(libc::NFT_META_PRIORITY);
            }
            Statement::PriorityVerdict { mask, map } => {
                self.load(Selector::Priority, 0);
                self.bitwise(mask.to_ne_bytes().into(), vec![0; 4]);
                self.lookup(map, Some(VERDICT_REGISTER), false);
            }
            Statement::SetPriority(value) => {
                let value = Attribute::Bytes(value.to_ne_bytes().into());
                self.push(
                    c"immediate",
                    [
                        (sys::NFTNL_EXPR_IMM_DREG, U32(register(0))),
                        (sys::NFTNL_EXPR_IMM_DATA, value),
                    ],
                );
                self.set_meta(libc::NFT_META_PRIORITY);
            }
            Statement::RandomPriority(largest) => {
                self.push(
                    c"numgen",
                    [
                        (sys::NFTNL_EXPR_NG_DREG, U32(register(0))),
                        (sys::NFTNL_EXPR_NG_MODULUS, U32(*largest)),
                        (sys::NFTNL_EXPR_NG_TYPE, U32(libc::NFT_NG_RANDOM as u32)),
                        (sys::NFTNL_EXPR_NG_OFFSET, U32(1)),
                    ],
                );
                self.set_meta(libc::NFT_META_PRIORITY);
            }
            Statement::UpdateMap {
                map,
                key,
                timeout,
                data,
            } => {
                let value = self.load_key(key, 0);
                self.load_key(data, value);
                let milliseconds = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
                self.push(
                    c"dynset",
                    [
                        (sys::NFTNL_EXPR_DYNSET_SREG_KEY, U32(register(0))),
                        (sys::NFTNL_EXPR_DYNSET_SREG_DATA, U32(register(value))),
                        (
                            sys::NFTNL_EXPR_DYNSET_OP,
                            U32(libc::NFT_DYNSET_OP_UPDATE as u32),
                        ),
                        (sys::NFTNL_EXPR_DYNSET_TIMEOUT, U64(milliseconds)),
                        (sys::NFTNL_EXPR_DYNSET_SET_NAME, Text(map.clone())),
                    ],
                );
            }
            Statement::Masquerade => {
                let flags = uapi::NF_NAT_RANGE_PROTO_RANDOM_FULLY;
                self.push(c"masq", [(sys::NFTNL_EXPR_MASQ_FLAGS, U32(flags))]);
            }
            Statement::Reject(with) => {
                let (kind, code) = match (with, self.family) {
                    (RejectWith::TcpReset, _) => (libc::NFT_REJECT_TCP_RST, 0),
                    (RejectWith::PortUnreachable, TableFamily::Ip) => {
                        (libc::NFT_REJECT_ICMP_UNREACH, 3)
                    }
                    (RejectWith::PortUnreachable, TableFamily::Ip6) => {
                        (libc::NFT_REJECT_ICMP_UNREACH, 4)
                    }
                    (RejectWith::AdminProhibited, TableFamily::Ip) => {
                        (libc::NFT_REJECT_ICMP_UNREACH, 13)
                    }
                    (RejectWith::AdminProhibited, TableFamily::Ip6) => {
                        (libc::NFT_REJECT_ICMP_UNREACH, 1)
                    }
                };
                self.push(
                    c"reject",
                    [
                        (sys::NFTNL_EXPR_REJECT_TYPE, U32(kind as u32)),
                        (sys::NFTNL_EXPR_REJECT_CODE, U8(code)),
                    ],
                );
            }
            Statement::Counter => self.push(c"counter", []),
            Statement::Verdict(verdict) => self.verdict(verdict),
            Statement::Foreign(_) => return Err(Unwritable),
        }
        Ok(())
    }
}

/// Returns the number of a verdict in netlink messages.
pub(crate) fn verdict_code(verdict: &Verdict) -> i32 {
    match verdict {
        Verdict::Accept => libc::NF_ACCEPT,
        Verdict::Drop => libc::NF_DROP,
        Verdict::Return => libc::NFT_RETURN,
        Verdict::Jump(_) => libc::NFT_JUMP,
        Verdict::Goto(_) => libc::NFT_GOTO,
    }
}

// The kernel's bits of nf_conntrack_common.h.
fn ct_state_bit(state: CtState) -> u32 {
    match state {
        CtState::Invalid => 1,
        CtState::Established => 2,
        CtState::Related => 4,
        CtState::New => 8,
    }
}

fn ct_status_bit(status: CtStatus) -> u32 {
    match status {
        CtStatus::Dnat => 1 << 5,
    }
}

#[cfg(test)]
mod tests {
    use super::register;

    #[test]
    fn registers_are_numbered_as_nft_does() {
        let numbers: Vec<u32> = (0..8).map(register).collect();
        assert_eq!(numbers, [1, 9, 10, 11, 2, 13, 14, 15]);
    }
}
