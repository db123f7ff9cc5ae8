//! User data: information for nft that the kernel stores without interpreting it.
//!
//! User data is a list of type (one byte), length (one byte) and value, in the layout of nft. Sets
//! carry the byte order of key and value, and whether they are concatenations.

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

/// The number of nft's expression for a concatenation, the same in all versions of nft.
const EXPRESSION_CONCAT: u32 = 13;

const BYTE_ORDER_INVALID: u32 = 0;
const BYTE_ORDER_HOST: u32 = 1;
const BYTE_ORDER_BIG: u32 = 2;

fn put(out: &mut Vec<u8>, kind: u8, value: &[u8]) {
    // Lengths are below 256: names and comments are shorter.
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
    put_typeof(&mut out, KEY_TYPEOF, key);
    if let Some(data) = data {
        put_typeof(&mut out, DATA_TYPEOF, data);
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

/// Encodes that a key or value is a concatenation. nft takes the fields from the type.
fn put_typeof(out: &mut Vec<u8>, kind: u8, selectors: &[Selector]) {
    if selectors.len() > 1 {
        let mut expression = Vec::new();
        put_u32(&mut expression, TYPEOF_EXPRESSION, EXPRESSION_CONCAT);
        put(&mut expression, TYPEOF_DATA, &[]);
        put(out, kind, &expression);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
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
