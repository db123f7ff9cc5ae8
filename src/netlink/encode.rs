//! Encodes a transaction as one batch of netlink messages.

use std::ffi::CString;
use std::ops::Range;

use nftnl::MsgType;

use super::error::Error;
use super::expr::{Program, verdict_code};
use super::ffi::{self, Scratch, SetAttributes};
use super::message::{AttrWriter, begin_message, end_message, family_number, set_resource};
use super::{uapi, udata};
use crate::nft::{
    Declaration, Element, FieldType, Name, ObjectPath, Op, Rule, Selector, SetKind, Stray,
    StrayKind, TableFamily, TableId, Transaction, Value,
};

/// The longest list of elements in one message, in bytes: its attribute has a 16-bit length.
const LONGEST_LIST: usize = 60_000;

// NFT_SET_* flags of the kernel.
const FLAG_INTERVAL: u32 = 0x4;
const FLAG_MAP: u32 = 0x8;
const FLAG_TIMEOUT: u32 = 0x10;
const FLAG_EVAL: u32 = 0x20;
const FLAG_CONCAT: u32 = 0x80;
const ELEMENT_INTERVAL_END: u32 = 1;
/// The number by which nft denotes the type of verdicts.
const TYPE_VERDICT: u32 = 0xffff_ff00;
/// The size that the kernel reserves for a verdict in a map element.
const VERDICT_LEN: u32 = 16;

/// An encoded transaction with the origin of each message.
#[derive(Debug)]
pub struct Batch {
    /// The messages from BATCH_BEGIN to BATCH_END.
    pub bytes: Vec<u8>,
    origins: Vec<Origin>,
}

/// The operation that a message encodes.
#[derive(Debug)]
struct Origin {
    op: usize,
    /// The elements in the message.
    elements: Range<usize>,
    /// Their offsets in the message.
    offsets: Vec<u16>,
}

impl Batch {
    /// Returns the number of messages between BATCH_BEGIN and BATCH_END.
    pub fn messages(&self) -> usize {
        self.origins.len()
    }

    /// Returns the object to which an error message refers. `index` is the sequence number of the
    /// message, counted from BATCH_BEGIN, and `offset` the position of the attribute at fault.
    pub(crate) fn path(
        &self,
        transaction: &Transaction,
        index: u32,
        offset: Option<u32>,
    ) -> ObjectPath {
        let origin = (index as usize)
            .checked_sub(1)
            .and_then(|index| self.origins.get(index));
        let Some((origin, op)) =
            origin.and_then(|origin| Some((origin, transaction.ops.get(origin.op)?)))
        else {
            return ObjectPath::Transaction;
        };
        let element = offset.and_then(|offset| {
            let offset = u16::try_from(offset).ok()?;
            let before = origin.offsets.partition_point(|start| *start <= offset);
            Some(origin.elements.start + before.checked_sub(1)?)
        });
        ObjectPath::of(op, element)
    }
}

/// Encodes a transaction in messages numbered from `first_seq`.
///
/// # Errors
///
/// [`Error::Name`] if the kernel does not accept a name; [`Error::ForeignRule`] if a rule was read
/// back from the kernel.
pub fn encode(transaction: &Transaction, first_seq: u32) -> Result<Batch, Error> {
    let mut encoder = Encoder {
        scratch: Scratch::new(),
        first_seq,
        sets: 0,
        batch: Batch {
            bytes: Vec::with_capacity(transaction.elements() * 100 + 4096),
            origins: Vec::new(),
        },
    };
    encoder.boundary(libc::NFNL_MSG_BATCH_BEGIN as u16, first_seq);
    for (index, op) in transaction.ops.iter().enumerate() {
        encoder.op(index, op)?;
    }
    let last = first_seq.wrapping_add(encoder.batch.messages() as u32 + 1);
    encoder.boundary(libc::NFNL_MSG_BATCH_END as u16, last);
    Ok(encoder.batch)
}

/// Encodes the message that appends a rule.
///
/// # Errors
///
/// As for [`encode`].
pub(crate) fn rule_message(
    scratch: &mut Scratch,
    table: &TableId,
    chain: &Name,
    rule: &Rule,
) -> Result<Vec<u8>, Error> {
    let path = || {
        ObjectPath::Rule(
            table.clone(),
            chain.clone(),
            crate::nft::text::rule(rule, table.family),
        )
    };
    let exprs =
        Program::rule(rule, table.family).map_err(|_| Error::ForeignRule { path: path() })?;
    let user_data = rule.comment.as_deref().map(udata::comment);
    let (table_name, chain_name) = (c_name(&table.name, path)?, c_name(chain, path)?);
    Ok(ffi::rule(
        scratch,
        (table.family, &table_name, &chain_name),
        &exprs,
        user_data.as_deref().unwrap_or_default(),
        MsgType::Add,
    ))
}

fn c_name(name: &Name, path: impl Fn() -> ObjectPath) -> Result<CString, Error> {
    /// `NFT_NAME_MAXLEN` of the kernel, without the terminating zero.
    const LONGEST: usize = 255;
    ffi::c_name(name.as_str())
        .filter(|name| name.as_bytes().len() <= LONGEST)
        .ok_or_else(|| Error::Name { path: path() })
}

struct Encoder {
    scratch: Scratch,
    first_seq: u32,
    sets: u32,
    batch: Batch,
}

impl Encoder {
    fn boundary(&mut self, kind: u16, seq: u32) {
        let start = begin_message(&mut self.batch.bytes, kind, 0, seq, 0);
        // The resource of a batch boundary is the subsystem.
        let subsystem = libc::NFNL_SUBSYS_NFTABLES as u16;
        set_resource(&mut self.batch.bytes, start, subsystem);
        end_message(&mut self.batch.bytes, start);
    }

    fn next_seq(&self) -> u32 {
        self.first_seq
            .wrapping_add(self.batch.messages() as u32 + 1)
    }

    /// Appends a message from libnftnl with the next sequence number and without a request for an
    /// acknowledgement: those of a large batch would overflow the receive buffer. Errors are reported
    /// in any case.
    fn push(&mut self, op: usize, mut message: Vec<u8>) {
        let seq = self.next_seq().to_ne_bytes();
        if let Some(field) = message.get_mut(8..12) {
            field.copy_from_slice(&seq);
        }
        if let Some(flags) = message.get_mut(6..).and_then(<[u8]>::first_chunk_mut::<2>) {
            *flags = (u16::from_ne_bytes(*flags) & !(libc::NLM_F_ACK as u16)).to_ne_bytes();
        }
        self.batch.bytes.extend_from_slice(&message);
        self.batch.origins.push(Origin {
            op,
            elements: 0..0,
            offsets: Vec::new(),
        });
    }

    fn op(&mut self, index: usize, op: &Op) -> Result<(), Error> {
        let path = || ObjectPath::of(op, None);
        let table = op.table();
        let table_name = c_name(&table.name, path)?;
        let at = (table.family, table_name.as_c_str());
        let message = match op {
            Op::AddTable(_) => {
                ffi::table(&mut self.scratch, table.family, &table_name, MsgType::Add)
            }
            Op::DeleteTable(_) => {
                ffi::table(&mut self.scratch, table.family, &table_name, MsgType::Del)
            }
            Op::AddSet(_, name, declaration) => {
                self.sets += 1;
                let attributes = set_attributes(declaration, table.family);
                let name = c_name(name, path)?;
                ffi::new_set(&mut self.scratch, at, &name, self.sets, &attributes)
            }
            Op::DeleteSet(_, name) => named_set(table, name, libc::NFT_MSG_DELSET),
            Op::FlushSet(_, name) => named_set(table, name, libc::NFT_MSG_DELSETELEM),
            Op::DeleteStray(_, stray) => deleted_stray(table, stray),
            Op::AddChain(_, name, base) => {
                let name = c_name(name, path)?;
                ffi::chain(&mut self.scratch, at, &name, base.as_ref(), MsgType::Add)
            }
            Op::DeleteChain(_, name) => {
                let name = c_name(name, path)?;
                ffi::chain(&mut self.scratch, at, &name, None, MsgType::Del)
            }
            Op::FlushChain(_, name) => {
                let name = c_name(name, path)?;
                let at = (table.family, table_name.as_c_str(), name.as_c_str());
                ffi::rule(&mut self.scratch, at, &[], &[], MsgType::Del)
            }
            Op::AddRule(_, chain, rule) => rule_message(&mut self.scratch, table, chain, rule)?,
            Op::AddElements(_, set, declaration, elements) => {
                self.elements(index, table, set, declaration, elements, true);
                return Ok(());
            }
            Op::DeleteElements(_, set, declaration, elements) => {
                self.elements(index, table, set, declaration, elements, false);
                return Ok(());
            }
        };
        self.push(index, message);
        Ok(())
    }

    fn elements(
        &mut self,
        op: usize,
        table: &TableId,
        set: &Name,
        declaration: &Declaration,
        elements: &[Element],
        add: bool,
    ) {
        let (kind, flags) = if add {
            // Without NLM_F_EXCL the kernel accepts an element that exists with the same value and
            // refuses one that exists with another value, which indicates a conflict.
            (libc::NFT_MSG_NEWSETELEM, libc::NLM_F_CREATE)
        } else {
            (libc::NFT_MSG_DELSETELEM, 0)
        };
        let kind = (libc::NFNL_SUBSYS_NFTABLES << 8 | kind) as u16;
        let mut next = 0;
        while next < elements.len() {
            let seq = self.next_seq();
            let bytes = &mut self.batch.bytes;
            let start = begin_message(bytes, kind, flags as u16, seq, family_number(table.family));
            let mut writer = AttrWriter::new(bytes);
            writer.string(uapi::NFTA_SET_ELEM_LIST_TABLE, table.name.as_str());
            writer.string(uapi::NFTA_SET_ELEM_LIST_SET, set.as_str());
            let list = writer.begin(uapi::NFTA_SET_ELEM_LIST_ELEMENTS);
            let first = next;
            let mut offsets = Vec::new();
            for element in elements.get(first..).unwrap_or_default() {
                let offset = writer.len() - start;
                if offset > LONGEST_LIST {
                    break;
                }
                offsets.push(offset as u16);
                write_element(&mut writer, element, declaration, add);
                next += 1;
            }
            writer.end(list);
            end_message(bytes, start);
            self.batch.origins.push(Origin {
                op,
                elements: first..next,
                offsets,
            });
        }
    }
}

/// Encodes a message that only names a set: a request to delete or to flush it.
fn named_set(table: &TableId, set: &Name, kind: libc::c_int) -> Vec<u8> {
    let kind = (libc::NFNL_SUBSYS_NFTABLES << 8 | kind) as u16;
    let mut bytes = Vec::new();
    let start = begin_message(&mut bytes, kind, 0, 0, family_number(table.family));
    let mut writer = AttrWriter::new(&mut bytes);
    // Table and name have the same attribute numbers in both messages.
    writer.string(uapi::NFTA_SET_TABLE, table.name.as_str());
    writer.string(uapi::NFTA_SET_NAME, set.as_str());
    end_message(&mut bytes, start);
    bytes
}

/// Encodes the deletion of a stateful object or flowtable, neither of which nftlet creates.
fn deleted_stray(table: &TableId, stray: &Stray) -> Vec<u8> {
    let (kind, object) = match stray.kind {
        StrayKind::Object(object) => (libc::NFT_MSG_DELOBJ, Some(object)),
        StrayKind::Flowtable => (uapi::NFT_MSG_DELFLOWTABLE, None),
    };
    let kind = (libc::NFNL_SUBSYS_NFTABLES << 8 | kind) as u16;
    let mut bytes = Vec::new();
    let start = begin_message(&mut bytes, kind, 0, 0, family_number(table.family));
    let mut writer = AttrWriter::new(&mut bytes);
    // Table and name have the same attribute numbers in both messages.
    writer.string(uapi::NFTA_OBJ_TABLE, table.name.as_str());
    writer.string(uapi::NFTA_OBJ_NAME, stray.name.as_str());
    if let Some(object) = object {
        writer.be32(uapi::NFTA_OBJ_TYPE, object);
    }
    end_message(&mut bytes, start);
    bytes
}

fn write_element(writer: &mut AttrWriter, element: &Element, declaration: &Declaration, add: bool) {
    let item = writer.begin(uapi::NFTA_LIST_ELEM);
    write_data(writer, uapi::NFTA_SET_ELEM_KEY, element.key.as_bytes());
    if let Some(end) = element
        .key_end
        .as_ref()
        .filter(|_| declaration.concatenated())
    {
        write_data(writer, uapi::NFTA_SET_ELEM_KEY_END, end.as_bytes());
    }
    if add {
        match &element.value {
            Value::None => {}
            Value::Data(data) => {
                write_data(writer, uapi::NFTA_SET_ELEM_DATA, data.as_bytes());
            }
            Value::Verdict(verdict) => {
                let data = writer.begin(uapi::NFTA_SET_ELEM_DATA);
                let nested = writer.begin(uapi::NFTA_DATA_VERDICT);
                writer.be32(uapi::NFTA_VERDICT_CODE, verdict_code(verdict) as u32);
                if let Some(chain) = verdict.target() {
                    writer.string(uapi::NFTA_VERDICT_CHAIN, chain.as_str());
                }
                writer.end(nested);
                writer.end(data);
            }
        }
        if let Some(comment) = &element.comment {
            let user_data = udata::comment(comment);
            writer.bytes(uapi::NFTA_SET_ELEM_USERDATA, &user_data);
        }
    }
    writer.end(item);
    // In a set with a single field an interval is two elements: its first key, and the key after its
    // last one with the flag for an end. An interval that includes the highest key has no end.
    let end = element
        .key_end
        .as_ref()
        .filter(|_| !declaration.concatenated());
    if let Some(end) = end.and_then(|end| following(end.as_bytes())) {
        let item = writer.begin(uapi::NFTA_LIST_ELEM);
        write_data(writer, uapi::NFTA_SET_ELEM_KEY, &end);
        writer.be32(uapi::NFTA_SET_ELEM_FLAGS, ELEMENT_INTERVAL_END);
        writer.end(item);
    }
}

pub(super) fn write_data(writer: &mut AttrWriter, kind: u16, value: &[u8]) {
    let data = writer.begin(kind);
    writer.bytes(uapi::NFTA_DATA_VALUE, value);
    writer.end(data);
}

/// Returns the next key in numeric order; `None` after the highest.
fn following(key: &[u8]) -> Option<Vec<u8>> {
    let mut next = key.to_vec();
    for byte in next.iter_mut().rev() {
        let (sum, overflow) = byte.overflowing_add(1);
        *byte = sum;
        if !overflow {
            return Some(next);
        }
    }
    None
}

/// Returns the attributes of a set for the kernel and for nft.
pub(crate) fn set_attributes(declaration: &Declaration, family: TableFamily) -> SetAttributes {
    let key = declaration.key_types(family);
    let data = match &declaration.kind {
        SetKind::Set => None,
        SetKind::VerdictMap => Some((TYPE_VERDICT, VERDICT_LEN)),
        SetKind::Map(data) => Some((type_number(data, family), length(data, family))),
    };
    let mut flags = 0;
    let mut flag = |on: bool, bit: u32| flags |= if on { bit } else { 0 };
    flag(declaration.interval, FLAG_INTERVAL);
    flag(declaration.interval && key.len() > 1, FLAG_CONCAT);
    flag(data.is_some(), FLAG_MAP);
    flag(declaration.timeout.is_some(), FLAG_TIMEOUT | FLAG_EVAL);
    let fields = if declaration.interval && key.len() > 1 {
        key.iter().map(|field| field.bytes() as u8).collect()
    } else {
        Vec::new()
    };
    SetAttributes {
        flags,
        key_type: type_number(&declaration.key, family),
        key_len: length(&declaration.key, family),
        data,
        timeout: declaration
            .timeout
            .map(|t| u64::try_from(t.as_millis()).unwrap_or(u64::MAX)),
        size: declaration.size,
        fields,
        user_data: udata::set(declaration, family),
        expression: declaration.counter.then_some("counter".into()),
    }
}

fn length(selectors: &[Selector], family: TableFamily) -> u32 {
    let fields = selectors.iter().map(|s| s.field_type(family));
    match selectors {
        [_] => fields.map(|f| f.bytes() as u32).sum(),
        _ => fields.map(|f| f.padded_len() as u32).sum(),
    }
}

/// Returns nft's number for a type, in a concatenation six bits for each field.
fn type_number(selectors: &[Selector], family: TableFamily) -> u32 {
    selectors.iter().fold(0, |number, selector| {
        let field = match selector.field_type(family) {
            FieldType::Ipv4Addr => 7,
            FieldType::Ipv6Addr => 8,
            FieldType::InetProto => 12,
            FieldType::InetService => 13,
            FieldType::ClassId => 23,
            FieldType::Icmp6Type => 29,
            FieldType::IfName => 41,
        };
        number << 6 | field
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nft::Key;

    #[test]
    fn the_key_behind_an_interval() {
        assert_eq!(following(&[10, 0, 0, 255]), Some(vec![10, 0, 1, 0]));
        assert_eq!(following(&[255; 4]), None);
    }

    #[test]
    fn a_long_list_is_split_and_every_element_can_be_found_again() {
        let declaration = std::sync::Arc::new(Declaration::new(
            SetKind::Set,
            [Selector::DestinationAddress],
        ));
        let elements: Vec<_> = (0..10_000u32)
            .map(|n| Element::new(Key::address(std::net::Ipv4Addr::from(n).into())))
            .collect();
        let table = TableId::new(TableFamily::Ip, "t");
        let transaction = Transaction {
            ops: vec![
                Op::AddTable(table.clone()),
                Op::AddElements(table.clone(), "s".into(), declaration, elements.clone()),
            ],
        };
        let batch = encode(&transaction, 7).unwrap();
        assert!(batch.messages() > 2, "{} messages", batch.messages());
        assert_eq!(
            batch.path(&transaction, 1, None),
            ObjectPath::Table(table.clone())
        );
        let mut seen = 0;
        for (message, origin) in batch.origins.iter().enumerate().skip(1) {
            for (index, offset) in origin.elements.clone().zip(&origin.offsets) {
                let inside = u32::from(*offset) + 4;
                let path = batch.path(&transaction, message as u32 + 1, Some(inside));
                let ObjectPath::Element(_, _, element, _) = path else {
                    panic!("{path}")
                };
                assert_eq!(*element, elements[index]);
                seen += 1;
            }
        }
        assert_eq!(seen, elements.len());
        assert_eq!(batch.path(&transaction, 0, None), ObjectPath::Transaction);
        assert_eq!(batch.path(&transaction, 999, None), ObjectPath::Transaction);
    }
}
