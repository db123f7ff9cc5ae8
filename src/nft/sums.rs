//! Elements that are compared without having all of them at hand.
//!
//! The elements of one side are added to [`Sums`] one by one, in any order, and those of the other
//! side to others. Where both have the same elements, both are equal; where they differ, they do so
//! in a few of many places, and a difference that stays can be told from others by its place and
//! amount.

use std::hash::{BuildHasher, Hash, RandomState};

use super::name::Name;
use super::table::{Element, Ruleset, TableId};

/// Into how many places elements are divided.
const PLACES: usize = 4_096;

/// What elements are hashed with: both sides of a comparison, and those that are compared with each
/// other, need the same. It is random, so that nobody can make up elements whose sums are equal.
#[derive(Clone, Debug, Default)]
pub struct SumKeys([RandomState; 2]);

impl SumKeys {
    fn hash(&self, what: &impl Hash) -> u128 {
        let SumKeys([high, low]) = self;
        u128::from(high.hash_one(what)) << 64 | u128::from(low.hash_one(what))
    }
}

/// Sums over elements of sets.
#[derive(Clone, Debug)]
pub struct Sums {
    keys: SumKeys,
    places: Box<[Place]>,
}

/// The sum of the hashes of the elements in a place, and their number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Place {
    sum: u128,
    count: u64,
}

/// A set whose elements are added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetOf(u128);

impl Sums {
    /// Of no elements.
    pub fn new(keys: SumKeys) -> Self {
        Self {
            keys,
            places: vec![Place::default(); PLACES].into(),
        }
    }

    /// Takes the elements out of tables and adds them.
    pub fn take(&mut self, ruleset: &mut Ruleset) {
        for (id, table) in &mut ruleset.tables {
            for (name, set) in &mut table.sets {
                let of = self.set(id, name);
                for element in std::mem::take(&mut set.elements) {
                    self.add(of, &element);
                }
            }
        }
    }

    /// The set with a name, for [`Sums::add`].
    pub fn set(&self, table: &TableId, name: &Name) -> SetOf {
        SetOf(self.keys.hash(&(table, name)))
    }

    /// Adds an element of a set.
    pub fn add(&mut self, set: SetOf, element: &Element) {
        let hash = self.keys.hash(&(set.0, element));
        // Other bits than those that the sums of small numbers would show first.
        let at = (hash >> 64) as usize % PLACES;
        if let Some(place) = self.places.get_mut(at) {
            place.sum = place.sum.wrapping_add(hash);
            place.count = place.count.wrapping_add(1);
        }
    }

    /// Adds what others are sums of.
    pub fn merge(&mut self, others: &Self) {
        for (place, other) in self.places.iter_mut().zip(&others.places) {
            place.sum = place.sum.wrapping_add(other.sum);
            place.count = place.count.wrapping_add(other.count);
        }
    }

    /// The places in which other sums differ from these, as hashes of place and amount.
    pub fn differences(&self, other: &Self) -> impl Iterator<Item = u64> {
        let places = self.places.iter().zip(&other.places).enumerate();
        places
            .filter(|(_, (one, two))| one != two)
            .map(|(at, (one, two))| {
                let amount = Place {
                    sum: two.sum.wrapping_sub(one.sum),
                    count: two.count.wrapping_sub(one.count),
                };
                self.keys.hash(&(at, amount)) as u64
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nft::{Family, Key, Verdict};

    fn element(port: u16) -> Element {
        Element::new(Key::build().port(port).finish())
    }

    fn sums_of(keys: &SumKeys, elements: impl Iterator<Item = (&'static str, Element)>) -> Sums {
        let mut sums = Sums::new(keys.clone());
        for (set, element) in elements {
            let set = sums.set(&TableId::new(Family::Ip, "table"), &set.into());
            sums.add(set, &element);
        }
        sums
    }

    fn differences(one: &Sums, two: &Sums) -> Vec<u64> {
        one.differences(two).collect()
    }

    #[test]
    fn the_order_of_elements_does_not_matter() {
        let keys = SumKeys::default();
        let elements = (0..10_000).map(|port| ("ports", element(port)));
        let one = sums_of(&keys, elements.clone());
        let two = sums_of(&keys, elements.rev());
        assert!(differences(&one, &two).is_empty());
    }

    #[test]
    fn everything_about_an_element_matters() {
        let keys = SumKeys::default();
        let one = sums_of(&keys, [("ports", element(80))].into_iter());
        let same = element(80);
        let others = [
            ("others", same.clone()),
            ("ports", element(81)),
            ("ports", same.clone().comment("web")),
            (
                "ports",
                Element {
                    key_end: Some(Box::new(element(90).key)),
                    ..same.clone()
                },
            ),
            ("ports", Element::with_verdict(same.key, Verdict::Drop)),
        ];
        for other in others {
            let two = sums_of(&keys, [other.clone()].into_iter());
            assert!(!differences(&one, &two).is_empty(), "{other:?}");
        }
        let twice = [("ports", element(80)), ("ports", element(80))];
        assert_eq!(
            differences(&one, &sums_of(&keys, twice.into_iter())).len(),
            1
        );
    }

    #[test]
    fn a_difference_is_the_same_whatever_else_there_is() {
        let keys = SumKeys::default();
        let with = |others: std::ops::Range<u16>, missing: Option<u16>| {
            let ports = others.filter(|port| Some(*port) != missing);
            sums_of(&keys, ports.map(|port| ("ports", element(port))))
        };
        let few = differences(&with(0..100, Some(7)), &with(0..100, None));
        let many = differences(&with(0..9_000, Some(7)), &with(0..9_000, None));
        assert_eq!(few.len(), 1);
        assert_eq!(few, many);
        let another = differences(&with(0..100, Some(8)), &with(0..100, None));
        assert_ne!(few, another);
        let reverse = differences(&with(0..100, None), &with(0..100, Some(7)));
        assert_ne!(few, reverse);
    }
}
