//! What the kernel holds, with sums in place of elements.

use super::error::Error;
use super::nftables::Nftables;
use super::read::element;
use crate::nft::{Declaration, Name, Ruleset, SumKeys, Sums, TableId};

impl Nftables {
    /// Reads the tables with the given names in both families as [`Nftables::read`] does, but of
    /// their elements no more than the sums.
    ///
    /// A dump that meets the kernel's moving of a hash table repeats elements and misses others
    /// without a mark. So a difference counts only where another reading shows it, too.
    ///
    /// # Errors
    ///
    /// When a dump fails or is interrupted over and over again.
    pub fn read_sums(
        &mut self,
        names: &[&str],
        wanted: &Ruleset,
        keys: &SumKeys,
    ) -> Result<(Ruleset, Sums), Error> {
        let mut sums = Sums::new(keys.clone());
        let found = self.read_with(names, wanted, &mut |nftables, id, name, declaration| {
            let readable = nftables.sum_set(id, name, declaration, keys, &mut sums)?;
            Ok(readable.then(Vec::new))
        })?;
        Ok((found, sums))
    }

    /// Returns whether all elements are such as nftlet writes.
    fn sum_set(
        &mut self,
        id: &TableId,
        name: &Name,
        declaration: &Declaration,
        keys: &SumKeys,
        sums: &mut Sums,
    ) -> Result<bool, Error> {
        let set = sums.set(id, name);
        // The kernel tells both ends of an interval apart. There are few of them.
        if declaration.interval && !declaration.concatenated() {
            let Some(elements) = self.settled_elements(id, name.as_str(), declaration)? else {
                return Ok(false);
            };
            for element in elements {
                sums.add(set, &element);
            }
            return Ok(true);
        }
        let mut names = Vec::new();
        let start = || (Sums::new(keys.clone()), true);
        let (dumped, readable) = self.each_element(
            id,
            name.as_str(),
            start,
            |(dumped, readable), item| match element(item, &mut names) {
                Some((element, _)) => dumped.add(set, &element),
                None => *readable = false,
            },
        )?;
        sums.merge(&dumped);
        Ok(readable)
    }
}
