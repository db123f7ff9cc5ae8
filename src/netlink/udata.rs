//! User data: information for nft that the kernel stores without interpreting it.
//!
//! User data is a list of type (one byte), length (one byte) and value, in the layout of nft. Sets
//! carry the byte order of key and value and, if these were declared by `typeof`, the expressions,
//! which `nft list` prints.

use crate::nft::{Declaration, Selector, SetKind, TableFamily};

const RULE_OR_ELEMENT_COMMENT: u8 = 0;

const KEY_BYTE_ORDER: u8 = 0;
const DATA_BYTE_ORDER: u8 = 1;
const KEY_TYPEOF: u8 = 3;
const DATA_TYPEOF: u8 = 4;
const DATA_INTERVAL: u8 = 6;
const SET_COMMENT: u8 = 7;

const TYPEOF_EXPRESSION: u8 = 0;
const TYPEOF_DATA: u8 = 1;

// Numbers of nft's expressions, which are the same in all versions of nft.
const EXPRESSION_PAYLOAD: u32 = 7;
const EXPRESSION_META: u32 = 9;
const EXPRESSION_CT: u32 = 12;
const EXPRESSION_CONCAT: u32 = 13;
const EXPRESSION_NUMGEN: u32 = 23;
const EXPRESSION_HASH: u32 = 24;

const BYTE_ORDER_INVALID: u32 = 0;
const BYTE_ORDER_HOST: u32 = 1;
const BYTE_ORDER_BIG: u32 = 2;

fn put(out: &mut Vec<u8>, kind: u8, value: &[u8]) {
    // Lengths are far below 256: the longest value is the typeof of five fields.
    out.push(kind);
    out.push(value.len() as u8);
    out.extend_from_slice(value);
}

fn put_u32(out: &mut Vec<u8>, kind: u8, value: u32) {
    put(out, kind, &value.to_ne_bytes());
}

fn put_text(out: &mut Vec<u8>, kind: u8, text: &str) {
    let mut value = text.as_bytes().to_vec();
    value.push(0);
    put(out, kind, &value);
}

/// Encodes the user data of a rule or element with a comment.
pub(crate) fn comment(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len() + 3);
    put_text(&mut out, RULE_OR_ELEMENT_COMMENT, text);
    out
}

/// Returns the comment in the user data of a rule or element.
pub(crate) fn read_comment(mut bytes: &[u8]) -> Option<&str> {
    while let [kind, length, rest @ ..] = bytes {
        let value = rest.get(..usize::from(*length))?;
        if *kind == RULE_OR_ELEMENT_COMMENT {
            return std::str::from_utf8(value.strip_suffix(&[0])?).ok();
        }
        bytes = rest.get(usize::from(*length)..)?;
    }
    None
}

/// Encodes the user data of a set.
pub(crate) fn set(declaration: &Declaration, family: TableFamily) -> Vec<u8> {
    let typeof_needed = declaration.needs_typeof(family);
    let mut out = Vec::new();
    let key = &declaration.key;
    put_u32(&mut out, KEY_BYTE_ORDER, byte_order(key, family));
    let data: Option<&[Selector]> = match &declaration.kind {
        SetKind::Set => None,
        SetKind::VerdictMap => Some(&[]),
        SetKind::Map(data) => Some(data),
    };
    if let Some(data) = data {
        put_u32(&mut out, DATA_BYTE_ORDER, byte_order(data, family));
    }
    put_typeof(&mut out, KEY_TYPEOF, key, typeof_needed, family);
    if let Some(data) = data {
        put_typeof(&mut out, DATA_TYPEOF, data, typeof_needed, family);
        put_u32(&mut out, DATA_INTERVAL, 0);
    }
    if let Some(comment) = &declaration.comment {
        put_text(&mut out, SET_COMMENT, comment);
    }
    out
}

fn byte_order(selectors: &[Selector], family: TableFamily) -> u32 {
    match selectors {
        [one] if one.field_type(family).host_order() => BYTE_ORDER_HOST,
        [_] => BYTE_ORDER_BIG,
        _ => BYTE_ORDER_INVALID,
    }
}

fn put_typeof(
    out: &mut Vec<u8>,
    kind: u8,
    selectors: &[Selector],
    by_example: bool,
    family: TableFamily,
) {
    let mut expression = Vec::new();
    match selectors {
        [] => return,
        [one] => {
            if !by_example {
                return;
            }
            put_expression(&mut expression, *one, family);
        }
        several => {
            put_u32(&mut expression, TYPEOF_EXPRESSION, EXPRESSION_CONCAT);
            let mut fields = Vec::new();
            if by_example {
                for (index, selector) in several.iter().enumerate() {
                    let mut field = Vec::new();
                    put_expression(&mut field, *selector, family);
                    put(&mut fields, index as u8, &field);
                }
            }
            put(&mut expression, TYPEOF_DATA, &fields);
        }
    }
    put(out, kind, &expression);
}

/// Encodes a selector like nft: the number of its expression and its distinguishing attributes.
fn put_expression(out: &mut Vec<u8>, selector: Selector, family: TableFamily) {
    // Protocol descriptions and their fields.
    const TH: u32 = 11;
    const IP: u32 = 12;
    const IP6: u32 = 13;
    const ICMP6: u32 = 14;
    let (network, source, destination) = match family {
        TableFamily::Ip => (IP, 11, 12),
        TableFamily::Ip6 => (IP6, 8, 9),
    };
    let (expression, numbers): (u32, Vec<u32>) = match selector {
        Selector::SourceAddress => (EXPRESSION_PAYLOAD, vec![network, source]),
        Selector::DestinationAddress => (EXPRESSION_PAYLOAD, vec![network, destination]),
        Selector::SourcePort => (EXPRESSION_PAYLOAD, vec![TH, 1]),
        Selector::DestinationPort => (EXPRESSION_PAYLOAD, vec![TH, 2]),
        Selector::Icmp6Type => (EXPRESSION_PAYLOAD, vec![ICMP6, 1]),
        Selector::L4Protocol => (EXPRESSION_META, vec![libc::NFT_META_L4PROTO as u32]),
        Selector::Mark => (EXPRESSION_META, vec![libc::NFT_META_MARK as u32]),
        Selector::Priority => (EXPRESSION_META, vec![libc::NFT_META_PRIORITY as u32]),
        Selector::InputInterface => (EXPRESSION_META, vec![libc::NFT_META_IIFNAME as u32]),
        Selector::OutputInterface => (EXPRESSION_META, vec![libc::NFT_META_OIFNAME as u32]),
        // The modulus is irrelevant in a declaration; nft writes 1.
        Selector::RandomIndex { .. } => (EXPRESSION_NUMGEN, vec![libc::NFT_NG_RANDOM as u32, 1, 0]),
        Selector::SourceHash { .. } => (EXPRESSION_HASH, vec![]),
        Selector::OriginalDestinationAddress => (EXPRESSION_CT, vec![libc::NFT_CT_DST as u32, 0]),
        Selector::OriginalDestinationPort => {
            (EXPRESSION_CT, vec![libc::NFT_CT_PROTO_DST as u32, 0])
        }
    };
    put_u32(out, TYPEOF_EXPRESSION, expression);
    let mut data = Vec::new();
    for (index, number) in numbers.into_iter().enumerate() {
        put_u32(&mut data, index as u8, number);
    }
    put(out, TYPEOF_DATA, &data);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn a_typeof_map_has_the_user_data_that_nft_writes() {
        let declaration = Declaration::new(
            SetKind::Map(vec![
                Selector::DestinationAddress,
                Selector::DestinationPort,
            ]),
            [
                Selector::L4Protocol,
                Selector::DestinationPort,
                Selector::RandomIndex { modulus: 1 },
            ],
        );
        // Recorded from nft 1.0.6.
        assert_eq!(
            hex(&set(&declaration, TableFamily::Ip)),
            "000400000000010400000000034a00040d0000000142000e00040900000001060004100000000114000407\
             000000010c00040b000000010402000000021a000417000000011200040100000001040100000002040000\
             0000043400040d000000012c0014000407000000010c00040c00000001040c000000011400040700000001\
             0c00040b000000010402000000060400000000"
        );
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn a_verdict_map_has_the_user_data_that_nft_writes() {
        let declaration = Declaration::new(
            SetKind::VerdictMap,
            [
                Selector::DestinationAddress,
                Selector::L4Protocol,
                Selector::DestinationPort,
            ],
        );
        assert_eq!(
            hex(&set(&declaration, TableFamily::Ip6)),
            "000400000000010400000000030800040d0000000100060400000000"
        );
    }

    #[test]
    fn comments_are_found_behind_other_data() {
        let mut bytes = vec![9, 1, 0];
        bytes.extend(comment("shop/web:http"));
        assert_eq!(read_comment(&bytes), Some("shop/web:http"));
        assert_eq!(read_comment(&[0, 9, b'a']), None);
        assert_eq!(read_comment(&[]), None);
    }
}
