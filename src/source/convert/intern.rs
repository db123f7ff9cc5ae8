//! One copy of every string that many objects repeat.

use std::collections::HashSet;
use std::sync::Arc;

/// Shares equal strings and equal lists of strings.
///
/// Node names, zones and port names come up in thousands of endpoints; each is kept once.
/// Strings that nothing refers to any more are dropped whenever the table has doubled, so that
/// nodes that come and go do not make it grow for ever.
#[derive(Debug)]
pub(super) struct Interner {
    strings: HashSet<Arc<str>>,
    lists: HashSet<Arc<[Arc<str>]>>,
    sweep_at: usize,
}

/// Tables below this size are never swept.
const SMALLEST_SWEEP: usize = 1024;

impl Default for Interner {
    fn default() -> Self {
        Self {
            strings: HashSet::new(),
            lists: HashSet::new(),
            sweep_at: SMALLEST_SWEEP,
        }
    }
}

impl Interner {
    /// The shared copy of a string.
    pub(super) fn string(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.strings.get(text) {
            return known.clone();
        }
        self.sweep_when_full();
        let new: Arc<str> = Arc::from(text);
        self.strings.insert(new.clone());
        new
    }

    /// The shared copy of a list of strings.
    pub(super) fn list<'a>(&mut self, texts: impl Iterator<Item = &'a str>) -> Arc<[Arc<str>]> {
        let texts: Vec<Arc<str>> = texts.map(|text| self.string(text)).collect();
        if let Some(known) = self.lists.get(texts.as_slice()) {
            return known.clone();
        }
        let new: Arc<[Arc<str>]> = Arc::from(texts);
        self.lists.insert(new.clone());
        new
    }

    fn sweep_when_full(&mut self) {
        if self.strings.len() + self.lists.len() < self.sweep_at {
            return;
        }
        // Lists first: they hold strings.
        self.lists.retain(|list| Arc::strong_count(list) > 1);
        self.strings.retain(|text| Arc::strong_count(text) > 1);
        self.sweep_at = SMALLEST_SWEEP.max(2 * (self.strings.len() + self.lists.len()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_strings_and_lists_are_shared() {
        let mut interner = Interner::default();
        let first = interner.string("zone-a");
        assert!(Arc::ptr_eq(&first, &interner.string("zone-a")));
        let list = interner.list(["zone-a", "zone-b"].into_iter());
        assert!(Arc::ptr_eq(
            &list,
            &interner.list(["zone-a", "zone-b"].into_iter())
        ));
        assert!(list.first().is_some_and(|zone| Arc::ptr_eq(zone, &first)));
    }

    #[test]
    fn strings_out_of_use_are_dropped() {
        let mut interner = Interner::default();
        let kept = interner.string("kept");
        for number in 0..10 * SMALLEST_SWEEP {
            interner.string(&number.to_string());
        }
        assert!(interner.strings.len() <= SMALLEST_SWEEP);
        assert!(Arc::ptr_eq(&kept, &interner.string("kept")));
    }
}
