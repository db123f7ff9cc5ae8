//! A hash map whose copies share their entries until one of them changes.

use std::borrow::Borrow;
use std::hash::{BuildHasher, Hash};
use std::sync::Arc;

use foldhash::HashMap;
use foldhash::fast::RandomState;

/// The average number of entries of a part above which the number of parts doubles.
const PART: usize = 64;

/// A hash map that is copied in constant time.
///
/// The hash of a key decides in which part its entry is. A copy shares all parts. The first change of
/// an entry thereafter copies its part, and the list of parts, one pointer for [`PART`] entries.
/// So the main thread can hand the objects of a whole cluster to another thread and go on changing
/// them.
///
/// Of the crates with such maps, `imbl` has a licence that `deny.toml` does not allow, and `rpds`
/// allocates each entry for itself.
#[derive(Clone, Debug)]
pub(crate) struct SharedMap<K, V> {
    /// None, or a power of two.
    parts: Arc<Vec<Part<K, V>>>,
    len: usize,
    hasher: RandomState,
}

type Part<K, V> = Arc<HashMap<K, V>>;

impl<K, V> Default for SharedMap<K, V> {
    fn default() -> Self {
        Self {
            parts: Arc::default(),
            len: 0,
            hasher: RandomState::default(),
        }
    }
}

impl<K, V> SharedMap<K, V> {
    /// Returns the number of entries.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether there are no entries.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Iterates over the entries, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.parts.iter().flat_map(|part| part.iter())
    }

    /// Iterates over the keys, in no order.
    pub fn keys(&self) -> impl Iterator<Item = &K> {
        self.iter().map(|(key, _)| key)
    }

    /// Iterates over the values, in no order.
    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }

    /// Returns the number of entries that were copied because they were shared with another map.
    #[cfg(test)]
    pub fn copied(&self, other: &Self) -> usize {
        let is_shared = |part: &&Part<K, V>| other.parts.iter().any(|it| Arc::ptr_eq(part, it));
        let own = self.parts.iter().filter(|part| !is_shared(part));
        own.map(|part| part.len()).sum()
    }
}

impl<K: Clone + Eq + Hash, V: Clone> SharedMap<K, V> {
    /// Returns the value of a key.
    pub fn get<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.parts.get(self.place(key))?.get(key)
    }

    /// Returns whether a key has a value.
    pub fn contains_key<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.get(key).is_some()
    }

    /// Returns the value of a key, to change it.
    pub fn get_mut<Q: Eq + Hash + ?Sized>(&mut self, key: &Q) -> Option<&mut V>
    where
        K: Borrow<Q>,
    {
        if !self.contains_key(key) {
            return None;
        }
        self.part_mut(key)?.get_mut(key)
    }

    /// Sets the value of a key and returns the old one.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        self.make_room();
        let old = self.part_mut(&key)?.insert(key, value);
        self.len += usize::from(old.is_none());
        old
    }

    /// Removes a key and returns its value.
    pub fn remove<Q: Eq + Hash + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        if !self.contains_key(key) {
            return None;
        }
        let old = self.part_mut(key)?.remove(key);
        self.len -= usize::from(old.is_some());
        old
    }

    fn place<Q: Hash + ?Sized>(&self, key: &Q) -> usize {
        // With at most one part, every key is in the first.
        let last = self.parts.len().saturating_sub(1) as u64;
        let place = self.hasher.hash_one(key) & last;
        usize::try_from(place).unwrap_or_default()
    }

    fn part_mut<Q: Hash + ?Sized>(&mut self, key: &Q) -> Option<&mut HashMap<K, V>> {
        let place = self.place(key);
        Arc::make_mut(&mut self.parts)
            .get_mut(place)
            .map(Arc::make_mut)
    }

    /// Doubles the number of parts if one more entry would be too many.
    fn make_room(&mut self) {
        if self.len < self.parts.len() * PART {
            return;
        }
        let number = (self.parts.len() * 2).max(1);
        let parts = vec![Part::default(); number];
        let old = std::mem::replace(&mut self.parts, Arc::new(parts));
        let entries = old.iter().flat_map(|part| part.iter());
        for (key, value) in entries {
            if let Some(part) = self.part_mut(key) {
                part.insert(key.clone(), value.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn content(map: &SharedMap<u16, u8>) -> BTreeMap<u16, u8> {
        map.iter().map(|(key, value)| (*key, *value)).collect()
    }

    proptest! {
        #[test]
        fn copies_are_independent(
            changes in prop::collection::vec((0u16..400, 0u8..4, 0u8..30), 0..800),
        ) {
            let mut map = SharedMap::default();
            let mut model: BTreeMap<u16, u8> = BTreeMap::new();
            let mut copies = Vec::new();
            for (key, change, copy) in changes {
                match change {
                    0 => prop_assert_eq!(map.remove(&key), model.remove(&key)),
                    1 => {
                        let (ours, theirs) = (map.get_mut(&key), model.get_mut(&key));
                        prop_assert_eq!(&ours, &theirs);
                        for value in [ours, theirs].into_iter().flatten() {
                            *value = value.wrapping_add(1);
                        }
                    }
                    _ => prop_assert_eq!(map.insert(key, change), model.insert(key, change)),
                }
                if copy == 0 {
                    copies.push((map.clone(), model.clone()));
                }
            }
            copies.push((map, model));
            for (map, model) in copies {
                prop_assert_eq!(map.len(), model.len());
                prop_assert_eq!(&content(&map), &model);
                prop_assert!((0..400).all(|key| map.get(&key) == model.get(&key)));
            }
        }
    }

    #[test]
    fn a_change_copies_a_part() {
        let mut map = SharedMap::default();
        for key in 0..10_000u32 {
            map.insert(key, key);
        }
        let copy = map.clone();
        assert_eq!(map.copied(&copy), 0);
        assert_eq!(map.remove(&70_000), None);
        assert_eq!(map.get_mut(&70_000), None);
        assert_eq!(map.copied(&copy), 0, "nothing changed");
        map.insert(7, 0);
        assert_eq!((map.get(&7), copy.get(&7)), (Some(&0), Some(&7)));
        let one = map.copied(&copy);
        assert!((1..=3 * PART).contains(&one), "{one}");
        map.remove(&7);
        assert!(map.copied(&copy) <= one, "the part is copied already");
    }
}
