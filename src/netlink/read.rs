//! Reads the tables of the kernel as a ruleset that can be compared with a wanted one.
//!
//! The kernel stores rules as expressions and sets as lengths and numbers, which cannot be translated
//! back to nftlet's typed values in general. Therefore what the kernel holds is compared with the
//! encoding of the wanted value: if both are equal, the result contains the wanted value. Anything
//! else becomes [`Statement::Foreign`] or a declaration without a key. These equal no wanted value, so
//! that the difference replaces them.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use super::encode::{self, set_attributes};
use super::error::Error;
use super::ffi::{self, Scratch, SetAttributes};
use super::message::{AttrReader, AttrWriter, family_number};
use super::nftables::{Dumped, Nftables};
use super::socket::{DUMP_ATTEMPTS, Message};
use super::{uapi, udata};
use crate::nft::{
    BaseChain, Chain, ChainKind, Data, Declaration, Element, Hook, Key, Name, Rule, Ruleset,
    RulesetPart, Set, SetKind, Statement, Table, TableFamily, TableId, Value, Verdict,
};

// NFT_SET_* flags of the kernel.
const SET_ANONYMOUS: u32 = 0x1;
const SET_CONSTANT: u32 = 0x2;
const ELEMENT_INTERVAL_END: u32 = 1;
const ELEMENTS: &str = "the elements of a set";

impl Nftables {
    /// Reads the tables with the given names in both families.
    ///
    /// `wanted` is the ruleset for the comparison. Tables that do not exist are missing in the result,
    /// and so are the elements of sets with a timeout, which packets add.
    ///
    /// # Errors
    ///
    /// When a dump fails or every attempt is interrupted.
    pub fn read(&mut self, names: &[&str], wanted: &Ruleset) -> Result<Ruleset, Error> {
        let mut found = Ruleset::default();
        for (id, flags) in self.flagged_tables(names)? {
            let empty = Table::default();
            let expected = wanted.tables.get(&id).unwrap_or(&empty);
            let mut table = self.table(&id, expected)?;
            table.foreign |= flags != 0;
            found.tables.insert(id, table);
        }
        Ok(found)
    }

    fn table(&mut self, id: &TableId, expected: &Table) -> Result<Table, Error> {
        let mut table = Table {
            chains: self.chains(id)?,
            strays: self.strays(id)?,
            ..Table::default()
        };
        for (chain, rule) in self.rules(id, None, expected)? {
            if let Some(chain) = table.chains.get_mut(&chain) {
                chain.rules.push(rule);
            }
        }
        let family = family_number(id.family);
        let dumped = self.dump(
            "the sets",
            libc::NFT_MSG_GETSET,
            family,
            &string_attribute(uapi::NFTA_SET_TABLE, id.name.as_str()),
        )?;
        for message in dumped.iter() {
            let attributes = message.attributes();
            if !is_of(attributes, message, id, uapi::NFTA_SET_TABLE) {
                continue;
            }
            let Some(name) = attributes.string(uapi::NFTA_SET_NAME) else {
                continue;
            };
            let flags = attributes.be32(uapi::NFTA_SET_FLAGS).unwrap_or_default();
            if flags & SET_ANONYMOUS != 0 {
                // The kernel deletes it together with its rule.
                continue;
            }
            // Its elements cannot be deleted before the rules that use it.
            table.foreign |= flags & SET_CONSTANT != 0;
            let name = Name::from(name);
            let expected = expected.sets.get(&name);
            let mut declaration = declaration(attributes, expected, id.family);
            let elements = if declaration.timeout.is_some() {
                Some(Vec::new())
            } else {
                let expected = expected.map_or(&[][..], |set| &set.elements);
                self.elements_of(id, &name, &declaration, expected)?
            };
            if elements.is_none() {
                // An element that cannot be read cannot be deleted by a difference.
                declaration = foreign_declaration(None);
            }
            let elements = elements.unwrap_or_default();
            table.sets.insert(
                name,
                Set {
                    declaration,
                    elements,
                },
            );
        }
        Ok(table)
    }

    /// Reads the elements of a set; `None` if some have a form that nftlet never writes.
    fn elements_of(
        &mut self,
        id: &TableId,
        set: &Name,
        declaration: &Declaration,
        expected: &[Element],
    ) -> Result<Option<Vec<Element>>, Error> {
        match self.elements_at(id, set, declaration, expected)? {
            Some(found) => Ok(Some(found)),
            None => self.settled_elements(id, set.as_str(), declaration),
        }
    }

    pub(super) fn dump_chains(&mut self, of: TableFamily) -> Result<Dumped, Error> {
        self.dump("the chains", libc::NFT_MSG_GETCHAIN, family_number(of), &[])
    }

    pub(super) fn chains(&mut self, id: &TableId) -> Result<BTreeMap<Name, Chain>, Error> {
        let dumped = self.dump_chains(id.family)?;
        let found = dumped.iter().filter_map(|message| {
            let attributes = message.attributes();
            let name = attributes.string(uapi::NFTA_CHAIN_NAME)?;
            is_of(attributes, message, id, uapi::NFTA_CHAIN_TABLE).then(|| {
                let chain = Chain {
                    base: base_chain(attributes),
                    rules: Vec::new(),
                };
                (Name::from(name), chain)
            })
        });
        Ok(found.collect())
    }

    /// Returns whether the kernel has a chain with its rules, or an element.
    ///
    /// # Errors
    ///
    /// When the kernel does not answer or every attempt at a dump is interrupted.
    pub fn has(&mut self, part: &RulesetPart) -> Result<bool, Error> {
        match part {
            RulesetPart::Chain(id, name, chain) => self.has_chain(id, name, chain),
            RulesetPart::Element(id, set, declaration, element) if declaration.interval => {
                let found = self.settled_elements(id, set.as_str(), declaration)?;
                Ok(found.is_some_and(|found| found.contains(element)))
            }
            RulesetPart::Element(id, set, _, element) => {
                let found = self.look_up(id, set, &element.key)?;
                Ok(found.is_some_and(|found| found.element == *element))
            }
        }
    }

    fn has_chain(&mut self, id: &TableId, name: &Name, chain: &Chain) -> Result<bool, Error> {
        let mut attributes = Vec::new();
        let mut writer = AttrWriter::new(&mut attributes);
        writer.string(uapi::NFTA_CHAIN_TABLE, id.name.as_str());
        writer.string(uapi::NFTA_CHAIN_NAME, name.as_str());
        let (kind, family) = (libc::NFT_MSG_GETCHAIN, family_number(id.family));
        let mut base = None;
        let errno = self.fetch_all("a chain", kind, family, &attributes, 1, |message| {
            base = base_chain(message.attributes());
        })?;
        if errno != 0 || base != chain.base {
            return Ok(false);
        }
        let mut expected = Table::default();
        expected.chains.insert(name.clone(), chain.clone());
        let found = self.rules(id, Some(name), &expected)?;
        let found = found.iter().filter(|(of, _)| of == name);
        Ok(found.map(|(_, rule)| rule).eq(&chain.rules))
    }

    /// Reads the rules of a table in order; with a chain, at least those of that chain.
    fn rules(
        &mut self,
        id: &TableId,
        of: Option<&Name>,
        expected: &Table,
    ) -> Result<Vec<(Name, Rule)>, Error> {
        let mut filter = string_attribute(uapi::NFTA_RULE_TABLE, id.name.as_str());
        if let Some(chain) = of {
            AttrWriter::new(&mut filter).string(uapi::NFTA_RULE_CHAIN, chain.as_str());
        }
        let dumped = self.dump(
            "the rules",
            libc::NFT_MSG_GETRULE,
            family_number(id.family),
            &filter,
        )?;
        let mut scratch = Scratch::new();
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        let mut rules = Vec::new();
        for message in dumped.iter() {
            let attributes = message.attributes();
            let chain = attributes.string(uapi::NFTA_RULE_CHAIN);
            let (true, Some(chain)) =
                (is_of(attributes, message, id, uapi::NFTA_RULE_TABLE), chain)
            else {
                continue;
            };
            let index = counts.entry(chain.to_owned()).or_default();
            let candidate = expected
                .chains
                .get(chain)
                .and_then(|chain| chain.rules.get(*index));
            *index += 1;
            let chain = Name::from(chain);
            let description = ffi::describe_rule(message.bytes).unwrap_or_default();
            let comment = attributes
                .get(uapi::NFTA_RULE_USERDATA)
                .and_then(udata::read_comment);
            let same = candidate.filter(|candidate| {
                candidate.comment.as_deref() == comment
                    && describe(&mut scratch, id, &chain, candidate).as_ref() == Some(&description)
            });
            let rule = same.cloned().unwrap_or_else(|| Rule {
                statements: [Statement::Foreign(Arc::from(description))].into(),
                comment: comment.map(Arc::from),
            });
            rules.push((chain, rule));
        }
        Ok(rules)
    }

    /// Reads the elements of a set that packets fill, without duplicates and sorted by key. Elements
    /// that are added or time out meanwhile may be missing.
    ///
    /// # Errors
    ///
    /// When the dump fails or every attempt is interrupted.
    pub fn elements(&mut self, id: &TableId, set: &str) -> Result<Vec<Element>, Error> {
        let (dumped, _) = self.dump_elements(id, set)?;
        let mut elements: Vec<Element> = dumped.into_iter().map(|(element, _)| element).collect();
        elements.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        elements.dedup_by(|a, b| a.key == b.key);
        Ok(elements)
    }

    /// Dumps the elements of a set that only nftlet fills, sorted by key; `None` if some have a form
    /// that nftlet never writes.
    ///
    /// The kernel resizes a hash table some time after elements were added. A dump during the resize
    /// repeats elements and misses others without being marked as interrupted. Duplicates indicate
    /// such a dump, which is repeated.
    fn settled_elements(
        &mut self,
        id: &TableId,
        set: &str,
        declaration: &Declaration,
    ) -> Result<Option<Vec<Element>>, Error> {
        for _ in 0..DUMP_ATTEMPTS {
            let (mut elements, unreadable) = self.dump_elements(id, set)?;
            if unreadable > 0 {
                return Ok(None);
            }
            if declaration.interval && !declaration.concatenated() {
                return Ok(Some(join_intervals(elements)));
            }
            elements.sort_unstable_by(|(a, _), (b, _)| a.key.cmp(&b.key));
            let dumped = elements.len();
            if !declaration.interval {
                elements.dedup_by(|(a, _), (b, _)| a.key == b.key);
            }
            if elements.len() == dumped {
                let elements = elements.into_iter();
                return Ok(Some(elements.map(|(element, _)| element).collect()));
            }
        }
        Err(Error::Interrupted {
            what: ELEMENTS,
            times: DUMP_ATTEMPTS,
        })
    }

    /// Dumps the elements of a set in the kernel's order, each with whether it ends an interval, and
    /// counts elements that nftlet never writes: a catch-all element, or an unknown verdict.
    fn dump_elements(
        &mut self,
        id: &TableId,
        set: &str,
    ) -> Result<(Vec<(Element, bool)>, usize), Error> {
        let mut names: Vec<Name> = Vec::new();
        let start = || (Vec::new(), 0);
        self.each_element(
            id,
            set,
            start,
            |(elements, unreadable), item| match element(item, &mut names) {
                Some(element) => elements.push(element),
                None => *unreadable += 1,
            },
        )
    }

    /// Reads the counters of a set: the key (or first key), packets and bytes of each element with a
    /// counter, sorted by key.
    ///
    /// # Errors
    ///
    /// When the dump fails or every attempt is interrupted.
    pub fn counters(&mut self, id: &TableId, set: &str) -> Result<Vec<(Key, u64, u64)>, Error> {
        for _ in 0..DUMP_ATTEMPTS {
            let mut counters = self.each_element(id, set, Vec::new, |counters, item| {
                let key = data_of(item, uapi::NFTA_SET_ELEM_KEY).map(Key::from_bytes);
                if let (Some(key), Some((packets, bytes))) = (key, counter(item)) {
                    counters.push((key, packets, bytes));
                }
            })?;
            counters.sort_unstable();
            let dumped = counters.len();
            counters.dedup_by(|(a, ..), (b, ..)| a == b);
            // As in `settled_elements`, duplicates indicate missing elements.
            if counters.len() == dumped {
                return Ok(counters);
            }
        }
        Err(Error::Interrupted {
            what: ELEMENTS,
            times: DUMP_ATTEMPTS,
        })
    }

    /// Dumps the elements of a set in the kernel's order. Calls `each` with the attributes of each and
    /// the value that `start` creates whenever the dump begins.
    pub(super) fn each_element<T>(
        &mut self,
        id: &TableId,
        set: &str,
        start: impl Fn() -> T,
        mut each: impl FnMut(&mut T, AttrReader),
    ) -> Result<T, Error> {
        let mut filter = Vec::new();
        let mut writer = AttrWriter::new(&mut filter);
        writer.string(uapi::NFTA_SET_ELEM_LIST_TABLE, id.name.as_str());
        writer.string(uapi::NFTA_SET_ELEM_LIST_SET, set);
        self.dump_into(
            ELEMENTS,
            libc::NFT_MSG_GETSETELEM,
            family_number(id.family),
            &filter,
            start,
            |found, message| {
                let list = message
                    .attributes()
                    .nested(uapi::NFTA_SET_ELEM_LIST_ELEMENTS);
                for (_, item) in list.into_iter().flatten() {
                    each(found, AttrReader::new(item));
                }
            },
        )
    }
}

pub(super) fn string_attribute(kind: u16, value: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    AttrWriter::new(&mut bytes).string(kind, value);
    bytes
}

/// Returns whether a dumped object belongs to a table: older kernels ignore the filter of a dump.
pub(super) fn is_of(attributes: AttrReader, message: Message, id: &TableId, table: u16) -> bool {
    message.family() == family_number(id.family)
        && attributes.string(table) == Some(id.name.as_str())
}

fn describe(scratch: &mut Scratch, id: &TableId, chain: &Name, rule: &Rule) -> Option<String> {
    let message = encode::rule_message(scratch, id, chain, rule).ok()?;
    ffi::describe_rule(&message)
}

/// Returns the hook of a base chain; `None` if its policy is not `accept`, which nftlet never writes.
fn base_chain(attributes: AttrReader) -> Option<BaseChain> {
    hooked(attributes).filter(|_| accepts(attributes))
}

/// Returns whether the policy of a base chain is `accept`.
pub(super) fn accepts(attributes: AttrReader) -> bool {
    let accept = u32::try_from(libc::NF_ACCEPT).ok();
    attributes.be32(uapi::NFTA_CHAIN_POLICY) == accept
}

/// Returns type, hook and priority of a base chain.
pub(super) fn hooked(attributes: AttrReader) -> Option<BaseChain> {
    let hook = attributes.nested(uapi::NFTA_CHAIN_HOOK)?;
    let number = hook.be32(uapi::NFTA_HOOK_HOOKNUM)?;
    let priority = hook.be32(uapi::NFTA_HOOK_PRIORITY)? as i32;
    let kind = match attributes.string(uapi::NFTA_CHAIN_TYPE)? {
        "nat" => ChainKind::Nat,
        "filter" => ChainKind::Filter,
        _ => return None,
    };
    let hook = match i32::try_from(number).ok()? {
        libc::NF_INET_PRE_ROUTING => Hook::Prerouting,
        libc::NF_INET_LOCAL_IN => Hook::Input,
        libc::NF_INET_FORWARD => Hook::Forward,
        libc::NF_INET_LOCAL_OUT => Hook::Output,
        _ => Hook::Postrouting,
    };
    Some(BaseChain {
        kind,
        hook,
        priority,
    })
}

/// Returns the declaration of a dumped set: the expected one if nftlet would write
/// the same attributes for it.
fn declaration(found: AttrReader, expected: Option<&Set>, family: TableFamily) -> Arc<Declaration> {
    let attributes = SetAttributes {
        flags: found.be32(uapi::NFTA_SET_FLAGS).unwrap_or_default(),
        key_type: found.be32(uapi::NFTA_SET_KEY_TYPE).unwrap_or_default(),
        key_len: found.be32(uapi::NFTA_SET_KEY_LEN).unwrap_or_default(),
        data: found
            .be32(uapi::NFTA_SET_DATA_TYPE)
            .zip(found.be32(uapi::NFTA_SET_DATA_LEN)),
        timeout: found.be64(uapi::NFTA_SET_TIMEOUT),
        size: found
            .nested(uapi::NFTA_SET_DESC)
            .and_then(|desc| desc.be32(uapi::NFTA_SET_DESC_SIZE)),
        fields: Vec::new(),
        user_data: found
            .get(uapi::NFTA_SET_USERDATA)
            .unwrap_or_default()
            .to_vec(),
        expression: set_expression(found),
    };
    let same = expected.filter(|set| {
        // The lengths of the fields follow from the key type.
        let wanted = SetAttributes {
            fields: Vec::new(),
            ..set_attributes(&set.declaration, family)
        };
        wanted == attributes
    });
    same.map_or_else(
        || foreign_declaration(attributes.timeout),
        |set| set.declaration.clone(),
    )
}

/// Returns a declaration that equals no wanted one.
fn foreign_declaration(timeout_ms: Option<u64>) -> Arc<Declaration> {
    Arc::new(Declaration {
        timeout: timeout_ms.map(std::time::Duration::from_millis),
        ..Declaration::new(SetKind::Set, [])
    })
}

/// Returns the name of the expression in the elements of a dumped set.
fn set_expression(found: AttrReader) -> Option<Cow<'static, str>> {
    if found.get(uapi::NFTA_SET_EXPRESSIONS).is_some() {
        // nftlet never declares several.
        return Some("several".into());
    }
    let expression = found.nested(uapi::NFTA_SET_EXPR)?;
    let name = expression.string(uapi::NFTA_EXPR_NAME);
    Some(Cow::Owned(name.unwrap_or_default().to_owned()))
}

/// Returns packets and bytes of a dumped element's counter.
pub(super) fn counter(item: AttrReader) -> Option<(u64, u64)> {
    let expression = item.nested(uapi::NFTA_SET_ELEM_EXPR)?;
    if expression.string(uapi::NFTA_EXPR_NAME) != Some("counter") {
        return None;
    }
    let counter = expression.nested(uapi::NFTA_EXPR_DATA)?;
    let packets = counter.be64(uapi::NFTA_COUNTER_PACKETS)?;
    Some((packets, counter.be64(uapi::NFTA_COUNTER_BYTES)?))
}

/// Parses an element; the flag says whether it ends an interval.
pub(super) fn element(item: AttrReader, names: &mut Vec<Name>) -> Option<(Element, bool)> {
    let key = Key::from_bytes(data_of(item, uapi::NFTA_SET_ELEM_KEY)?);
    let value = match item.nested(uapi::NFTA_SET_ELEM_DATA) {
        None => Value::None,
        Some(data) => match data.nested(uapi::NFTA_DATA_VERDICT) {
            Some(verdict) => Value::Verdict(read_verdict(verdict, names)?),
            None => Value::Data(Data::from_bytes(data.get(uapi::NFTA_DATA_VALUE)?)),
        },
    };
    let comment = item
        .get(uapi::NFTA_SET_ELEM_USERDATA)
        .and_then(udata::read_comment);
    let flags = item.be32(uapi::NFTA_SET_ELEM_FLAGS).unwrap_or_default();
    let element = Element {
        key,
        key_end: data_of(item, uapi::NFTA_SET_ELEM_KEY_END)
            .map(|end| Box::new(Key::from_bytes(end))),
        value,
        comment: comment.map(Arc::from),
    };
    Some((element, flags & ELEMENT_INTERVAL_END != 0))
}

/// Returns the bytes of an element's key, or of the end of its interval.
fn data_of(item: AttrReader<'_>, kind: u16) -> Option<&[u8]> {
    item.nested(kind)?.get(uapi::NFTA_DATA_VALUE)
}

/// Parses a verdict. `names` interns the names of chains, since many elements refer to few chains.
fn read_verdict(verdict: AttrReader, names: &mut Vec<Name>) -> Option<Verdict> {
    let code = verdict.be32(uapi::NFTA_VERDICT_CODE)? as i32;
    let mut chain = || {
        let name = verdict.string(uapi::NFTA_VERDICT_CHAIN)?;
        match names.binary_search_by(|known| known.as_str().cmp(name)) {
            Ok(index) => names.get(index).cloned(),
            Err(index) => {
                names.insert(index, Name::from(name));
                names.get(index).cloned()
            }
        }
    };
    match code {
        libc::NF_ACCEPT => Some(Verdict::Accept),
        libc::NF_DROP => Some(Verdict::Drop),
        libc::NFT_RETURN => Some(Verdict::Return),
        libc::NFT_JUMP => chain().map(Verdict::Jump),
        libc::NFT_GOTO => chain().map(Verdict::Goto),
        _ => None,
    }
}

/// Joins the two elements of each interval: its first key, and the key after its last one, marked as
/// an end. An interval without an end includes the highest key.
fn join_intervals(mut elements: Vec<(Element, bool)>) -> Vec<Element> {
    // Of the same key an end sorts before a start: it ends the previous interval.
    elements.sort_unstable_by(|(a, a_end), (b, b_end)| a.key.cmp(&b.key).then(b_end.cmp(a_end)));
    let mut joined: Vec<Element> = Vec::new();
    let mut open: Option<Element> = None;
    for (element, is_end) in elements {
        if is_end {
            if let Some(mut start) = open.take() {
                start.key_end = Some(Box::new(before(&element.key)));
                joined.push(start);
            }
        } else {
            open = Some(element);
        }
    }
    if let Some(mut last) = open {
        let end = Key::from_bytes(&vec![0xff; last.key.as_bytes().len()]);
        last.key_end = Some(Box::new(end));
        joined.push(last);
    }
    joined
}

/// Returns the previous key in numeric order.
fn before(key: &Key) -> Key {
    let mut bytes = key.as_bytes().to_vec();
    for byte in bytes.iter_mut().rev() {
        let (difference, borrow) = byte.overflowing_sub(1);
        *byte = difference;
        if !borrow {
            break;
        }
    }
    Key::from_bytes(&bytes)
}
