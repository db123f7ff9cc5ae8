//! The chains that draw a random index of an endpoint, by the number of endpoints.
//!
//! The number below which a rule draws an index is a constant of the rule. The chain of a count
//! stores the index in the packet's priority and returns; the caller (`dispatch`) looks the
//! endpoint up. Only one rule reads each map of endpoints: the kernel looks at all rules that read
//! a map for each element that is added to it.
//!
//! Up to 64 endpoints, each count has its own chain. Above 64, one chain serves a class, a range of
//! counts, and draws an index below the largest count of the class. The caller draws up to
//! [`DRAWS`] times until the index has an endpoint, and then among the indexes of the next smaller
//! class, all of which have one. The largest count of a class is about √2 times that of the next
//! smaller class, so that no endpoint gets less than 99 % of its share: a draw fails with a
//! probability below 0.3.
//!
//! All these chains are created together, with the first service of a family, so that a change of
//! services changes elements only.

use std::sync::LazyLock;

use crate::nft::{Chain, Element, Key, Name, Rule, Statement, Verdict};

/// The largest number of endpoints with a chain of its own.
const EXACT: u32 = 64;
/// The number of classes above; the last one includes `MOST_ELEMENTS`.
const CLASSES: u32 = 26;
/// The number of draws among the indexes of a class.
pub(super) const DRAWS: usize = 4;
/// The verdict map from a number of endpoints to the chain that draws an index.
pub(super) const DRAW: &str = "draw";
/// The same, to a chain that draws only indexes that have an endpoint.
pub(super) const DRAW_FILLED: &str = "draw-filled";

/// The number of endpoints as far as chains distinguish it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Count(
    /// The largest number in the class.
    u32,
);

impl Count {
    /// Returns the class of a number of endpoints, at least 1.
    pub fn of(endpoints: usize) -> Self {
        let endpoints = u32::try_from(endpoints).unwrap_or(u32::MAX);
        if endpoints <= EXACT {
            return Self(endpoints.max(1));
        }
        let fits = (1..CLASSES).map(bound).find(|bound| endpoints <= *bound);
        Self(fits.unwrap_or_else(|| bound(CLASSES)))
    }

    /// Returns all classes in ascending order.
    pub fn all() -> impl Iterator<Item = Self> {
        let classes = (1..=CLASSES).map(bound);
        (1..=EXACT).chain(classes).map(Self)
    }

    /// Returns the number of indexes that have an endpoint with any number in the class.
    #[cfg(test)]
    pub(crate) fn filled(self) -> u32 {
        self.smaller().map_or(self.0, |smaller| smaller.0 + 1)
    }

    /// Returns the next smaller class, for a class of several numbers.
    fn smaller(self) -> Option<Self> {
        let mut bounds = (0..CLASSES).rev().map(bound);
        bounds.find(|bound| *bound < self.0).map(Self)
    }

    /// Returns a number of 16 bits that reads, in hexadecimal, like the decimal number of
    /// endpoints: 0x64 for 64. From 10,000 on it counts thousands, after the digit `a`: 0xa011 for
    /// 11,585.
    pub fn code(self) -> u16 {
        let digits = |number: u32| {
            let place = |power| (number / 10u32.pow(power) % 10) << (4 * power);
            (0..4).map(place).sum::<u32>()
        };
        let code = match self.0 {
            small @ 0..10_000 => digits(small),
            large => 0xa000 | digits(large / 1000),
        };
        code as u16
    }

    /// Returns the name of the chain: `draw-3`, or `draw-65-91` for a class.
    fn chain(self) -> Name {
        match self.smaller() {
            None => format!("draw-{}", self.0),
            Some(smaller) => format!("draw-{}-{}", smaller.0 + 1, self.0),
        }
        .into()
    }

    /// Returns the key in the maps [`DRAW`] and [`DRAW_FILLED`].
    pub(super) fn key(self) -> Key {
        Key::build().number(self.code().into()).finish()
    }

    /// Returns the rule that draws an index.
    fn rule(self) -> Rule {
        Rule::new([Statement::RandomPriority(self.0)])
    }
}

/// Returns the largest number of the class at an index: 64 times the power of √2.
fn bound(index: u32) -> u32 {
    // √2 times 64, in thousandths.
    const ROOT: u32 = 90_510;
    match index % 2 {
        0 => EXACT << (index / 2),
        _ => ((u64::from(ROOT) << (index / 2)) / 1000) as u32 + 1,
    }
}

/// The chains and the elements that lead to them.
pub(super) struct Draws {
    pub chains: Vec<(Name, Chain)>,
    /// The elements of the verdict maps from a number of endpoints to its chain.
    pub elements: [(Name, Vec<Element>); 2],
}

/// Returns the chains and the elements that lead to them, the same in every table.
pub(super) fn draws() -> &'static Draws {
    static CHAINS: LazyLock<Draws> = LazyLock::new(|| {
        let chain = |count: Count| {
            let rules = vec![count.rule()];
            (count.chain(), Chain { base: None, rules })
        };
        let elements = |target: fn(Count) -> Count| {
            let element = |count: Count| {
                Element::with_verdict(count.key(), Verdict::Jump(target(count).chain()))
            };
            let mut elements: Vec<Element> = Count::all().map(element).collect();
            elements.sort_by(|a, b| a.key.cmp(&b.key));
            elements
        };
        Draws {
            chains: Count::all().map(chain).collect(),
            elements: [
                (DRAW.into(), elements(|count| count)),
                (
                    DRAW_FILLED.into(),
                    elements(|count| count.smaller().unwrap_or(count)),
                ),
            ],
        }
    });
    &CHAINS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::MOST_ELEMENTS;

    #[test]
    fn each_number_has_a_class_that_holds_it() {
        let all: Vec<Count> = Count::all().collect();
        assert!(all.windows(2).all(|pair| pair[0] < pair[1]));
        let names: std::collections::BTreeSet<u16> = all.iter().map(|it| it.code()).collect();
        assert_eq!(names.len(), all.len(), "two classes with one number");
        assert!(all.last().unwrap().0 as usize >= MOST_ELEMENTS);
        for endpoints in 1..3000 {
            let count = Count::of(endpoints);
            assert!(all.contains(&count));
            assert!(count.0 as usize >= endpoints);
            assert!(
                count.filled() as usize <= endpoints,
                "{endpoints}: {count:?}"
            );
        }
        assert_eq!(Count::of(usize::MAX), *all.last().unwrap());
    }

    #[test]
    fn all_draws_of_a_class_fail_in_less_than_one_percent() {
        for count in Count::all() {
            let missed = 1.0 - f64::from(count.filled()) / f64::from(count.0);
            assert!(missed.powi(DRAWS as i32) < 0.01, "{count:?}: {missed}");
        }
    }

    #[test]
    fn names_and_codes_show_the_number() {
        let name = |endpoints| Count::of(endpoints).chain();
        assert_eq!(name(64).as_str(), "draw-64");
        assert_eq!(name(65).as_str(), "draw-65-91");
        assert_eq!(name(92).as_str(), "draw-92-128");
        let code = |endpoints| Count::of(endpoints).code();
        assert_eq!([code(1), code(10), code(64)], [0x1, 0x10, 0x64]);
        assert_eq!([code(65), code(9000), code(20_000)], [0x91, 0xa011, 0xa023]);
    }
}
