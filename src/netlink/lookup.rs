//! Large sets are read by asking for the elements that are wanted.
//!
//! A dump of a set begins anew for every datagram of some hundred elements, and passes over those that
//! it told before. So its time grows with the square of their number: half a second for 100,000, and
//! most of a minute for a million. To be asked for one element costs the kernel the same whatever the
//! number. What is wanted is known, and where the kernel tells how many elements a set has (Linux
//! 6.17), it is known as well whether there are others.

use super::attr::{Reader, Writer};
use super::encode::{family_number, write_data};
use super::error::Error;
use super::nftables::Nftables;
use super::read::element;
use super::uapi;
use crate::nft::{Declaration, Element, Name, TableId};

/// From that many elements on a dump takes longer.
const LARGE: usize = 150_000;
/// How many elements are asked for at once. Each is answered by a message of its own, for all of
/// which the receive buffer must have room.
const AT_ONCE: usize = 100;
/// How many of those asked for may be missing. For each there is another request.
const MOST_MISSING: usize = 1_000;
const WHAT: &str = "elements of a set";

impl Nftables {
    /// The elements of a large set, sorted by key as `wanted` is, where it has no others than at the
    /// keys of `wanted`. `None` where this cannot be told, or where a dump is as good.
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
                &request(id, set, asked),
                asked.len(),
                |message| {
                    let list = message
                        .attributes()
                        .nested(uapi::NFTA_SET_ELEM_LIST_ELEMENTS);
                    for (_, item) in list.into_iter().flatten() {
                        match element(Reader::new(item), &mut names) {
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
            // The kernel answers in order and ends with the first that is missing.
            let done = found.len() - already + absent;
            if done == 0 {
                // Answers without an element would be asked for again for ever.
                return Ok(None);
            }
            rest = rest.get(done..).unwrap_or_default();
        }
        // There are others, or somebody wrote meanwhile.
        let whole = found.len() == count && self.generation()? == before;
        Ok(whole.then_some(found))
    }

    /// How many elements a set has, where the kernel tells.
    fn count(&mut self, id: &TableId, set: &Name) -> Result<Option<usize>, Error> {
        let mut attributes = Vec::new();
        let mut writer = Writer::new(&mut attributes);
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

fn request(id: &TableId, set: &Name, elements: &[Element]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = Writer::new(&mut bytes);
    writer.string(uapi::NFTA_SET_ELEM_LIST_TABLE, id.name.as_str());
    writer.string(uapi::NFTA_SET_ELEM_LIST_SET, set.as_str());
    let list = writer.begin(uapi::NFTA_SET_ELEM_LIST_ELEMENTS);
    for element in elements {
        let item = writer.begin(uapi::NFTA_LIST_ELEM);
        write_data(&mut writer, uapi::NFTA_SET_ELEM_KEY, element.key.as_bytes());
        writer.end(item);
    }
    writer.end(list);
    bytes
}
