//! Reads large sets by looking up the wanted elements instead of dumping.
//!
//! During a dump the kernel walks the set from its beginning for every datagram of some hundred
//! elements. The time is quadratic in the number of elements: half a second for 100,000, most of a
//! minute for a million. A lookup of one element takes constant time. The count of elements, which
//! Linux 6.17 and later report, shows whether the set has others than the wanted ones.

use std::io;
use std::time::Duration;

use super::encode::write_data;
use super::error::Error;
use super::message::{AttrReader, AttrWriter, family_number};
use super::nftables::Nftables;
use super::read::{counter, element};
use super::uapi;
use crate::nft::{Declaration, Element, Key, Name, TableId};

/// The size from which lookups are faster than a dump.
const LARGE: usize = 150_000;
/// The number of elements in one request. The kernel answers each with a message of its own, all of
/// which must fit in the receive buffer.
const AT_ONCE: usize = 100;
/// The most missing elements before falling back to a dump: each takes another request.
const MOST_MISSING: usize = 1_000;
const WHAT: &str = "elements of a set";

/// An element as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundElement {
    /// The element.
    pub element: Element,
    /// The time after which the kernel removes it, in a set with a timeout.
    pub expires: Option<Duration>,
    /// The packets that it counted.
    pub packets: Option<u64>,
}

impl Nftables {
    /// Looks up an element by its key; `None` if the set does not have it or does not exist. In a set of
    /// intervals the key is the beginning of one.
    ///
    /// # Errors
    ///
    /// When the kernel does not answer.
    pub fn look_up(
        &mut self,
        id: &TableId,
        set: &Name,
        key: &Key,
    ) -> Result<Option<FoundElement>, Error> {
        let mut found = None;
        let errno = self.fetch_all(
            WHAT,
            libc::NFT_MSG_GETSETELEM,
            family_number(id.family),
            &request(id, set, [key]),
            1,
            |message| {
                let list = message
                    .attributes()
                    .nested(uapi::NFTA_SET_ELEM_LIST_ELEMENTS);
                let mut items = list.into_iter().flatten();
                found = items.next().and_then(|(_, item)| {
                    let item = AttrReader::new(item);
                    let (element, _) = element(item, &mut Vec::new())?;
                    let expires = item.be64(uapi::NFTA_SET_ELEM_EXPIRATION);
                    Some(FoundElement {
                        element,
                        expires: expires.map(Duration::from_millis),
                        packets: counter(item).map(|(packets, _)| packets),
                    })
                });
            },
        )?;
        match errno {
            0 => Ok(found),
            libc::ENOENT => Ok(None),
            errno => Err(Error::Receive {
                what: WHAT,
                source: io::Error::from_raw_os_error(errno),
            }),
        }
    }

    /// Returns the elements of a large set, sorted by key like `wanted`, if it has no others than
    /// at the keys of `wanted`. `None` if it has, if the kernel cannot count them, or if a dump is
    /// as fast.
    ///
    /// # Errors
    ///
    /// When the kernel does not answer.
    pub(super) fn elements_at(
        &mut self,
        id: &TableId,
        set: &Name,
        declaration: &Declaration,
        wanted: &[Element],
    ) -> Result<Option<Vec<Element>>, Error> {
        if wanted.len() < LARGE || declaration.interval || declaration.timeout.is_some() {
            return Ok(None);
        }
        let before = self.generation()?;
        let Some(count) = self.count(id, set)? else {
            return Ok(None);
        };
        let (mut found, mut names) = (Vec::with_capacity(wanted.len()), Vec::new());
        let (mut rest, mut missing) = (wanted, 0);
        while !rest.is_empty() {
            let asked = rest.get(..AT_ONCE.min(rest.len())).unwrap_or_default();
            let already = found.len();
            let mut readable = true;
            let errno = self.fetch_all(
                WHAT,
                libc::NFT_MSG_GETSETELEM,
                family_number(id.family),
                &request(id, set, asked.iter().map(|element| &element.key)),
                asked.len(),
                |message| {
                    let list = message
                        .attributes()
                        .nested(uapi::NFTA_SET_ELEM_LIST_ELEMENTS);
                    for (_, item) in list.into_iter().flatten() {
                        match element(AttrReader::new(item), &mut names) {
                            Some((element, _)) => found.push(element),
                            None => readable = false,
                        }
                    }
                },
            )?;
            let absent = match errno {
                0 => 0,
                libc::ENOENT => 1,
                _ => return Ok(None),
            };
            missing += absent;
            if !readable || missing > MOST_MISSING {
                return Ok(None);
            }
            // The kernel answers in order and stops at the first missing element.
            let done = found.len() - already + absent;
            if done == 0 {
                // Without progress the loop would not end.
                return Ok(None);
            }
            rest = rest.get(done..).unwrap_or_default();
        }
        // Otherwise the set has further elements, or another process wrote meanwhile.
        let whole = found.len() == count && self.generation()? == before;
        Ok(whole.then_some(found))
    }

    /// Returns the number of elements of a set, if the kernel reports it.
    fn count(&mut self, id: &TableId, set: &Name) -> Result<Option<usize>, Error> {
        let mut attributes = Vec::new();
        let mut writer = AttrWriter::new(&mut attributes);
        writer.string(uapi::NFTA_SET_TABLE, id.name.as_str());
        writer.string(uapi::NFTA_SET_NAME, set.as_str());
        let mut count = None;
        self.fetch_all(
            "a set",
            libc::NFT_MSG_GETSET,
            family_number(id.family),
            &attributes,
            1,
            |message| count = message.attributes().be32(uapi::NFTA_SET_COUNT),
        )?;
        Ok(count.and_then(|count| usize::try_from(count).ok()))
    }
}

fn request<'a>(id: &TableId, set: &Name, keys: impl IntoIterator<Item = &'a Key>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = AttrWriter::new(&mut bytes);
    writer.string(uapi::NFTA_SET_ELEM_LIST_TABLE, id.name.as_str());
    writer.string(uapi::NFTA_SET_ELEM_LIST_SET, set.as_str());
    let list = writer.begin(uapi::NFTA_SET_ELEM_LIST_ELEMENTS);
    for key in keys {
        let item = writer.begin(uapi::NFTA_LIST_ELEM);
        write_data(&mut writer, uapi::NFTA_SET_ELEM_KEY, key.as_bytes());
        writer.end(item);
    }
    writer.end(list);
    bytes
}
