//! The chains that translate packets to a random endpoint, one for each possible number of endpoints.
//!
//! The kernel looks at every element of a map for each new chain that reads it. Therefore all chains
//! that read one map are created with the first service that needs any of them, while the map is
//! empty. A change of a service then adds and deletes elements only.
//!
//! Not all maps have chains from the start, because each commit, whatever it changes, looks at every
//! chain of every table: 720 chains double the time of a small transaction (0.15 ms).
//!
//! Up to 64 endpoints a chain draws an index below their exact number. Above, a chain serves a class
//! of numbers: it draws an index below the largest one, up to [`DRAWS`] times until the index has an
//! endpoint, and then among the indexes of the next smaller class, all of which have one. The largest
//! number of a class is at most √2 times that of the smaller one, so that no
//! endpoint gets less than 99 % of its share: a draw fails with a probability below 0.3.

use std::sync::LazyLock;

use super::layout::{By, Scope};
use crate::nft::{Chain, Element, Key, Name, Rule, Statement, Verdict};

/// The largest number of endpoints with a chain of its own.
const EXACT: u32 = 64;
/// The number of classes above; the last one includes `MOST_ELEMENTS`.
const CLASSES: u32 = 26;
/// The number of draws among the indexes of a class.
const DRAWS: usize = 4;

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

    /// Returns a number of 16 bits that reads, in hexadecimal, like the decimal number of slots:
    /// 0x64 for 64. From 10,000 on it counts thousands, after the digit `a`: 0xa011 for 11,585.
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

    /// Returns the name of the chain: `lb-3`, or `lb-65-91` for a class.
    pub fn chain(self, by: By, scope: Scope) -> Name {
        let stem = stem(by, scope);
        match self.smaller() {
            None => format!("{stem}-{}", self.0),
            Some(smaller) => format!("{stem}-{}-{}", smaller.0 + 1, self.0),
        }
        .into()
    }

    /// Returns the key in the maps of [`by_count`].
    pub(super) fn key(self) -> Key {
        Key::build().number(self.code().into()).finish()
    }

    /// Returns the rules that translate a packet.
    ///
    /// A packet evaluates the rules of the generation in which it started, but looks up the elements
    /// of the newest one. If endpoints were removed since, the index may have none; index 0 has one as
    /// long as any endpoint exists. Otherwise, or if the table was deleted, the packet is dropped and
    /// the client retries: without a verdict it would leave the node with the service's address, and
    /// after a rejection the client would give up.
    fn rules(self, by: By, scope: Scope) -> Vec<Rule> {
        let map = by.endpoints(scope).name();
        let dnat = |slots| Statement::DnatByMap(by.endpoint_key(slots), map.clone());
        let mut rules = vec![Rule::new([Statement::ClearPriority, dnat(self.0)])];
        if let Some(smaller) = self.smaller() {
            let again = std::iter::repeat_n(self.0, DRAWS - 1).chain([smaller.0]);
            rules.extend(again.map(|slots| Rule::new([dnat(slots)])));
        }
        let next = match self.0 {
            1 => Verdict::Drop,
            _ => Verdict::Goto(Self(1).chain(by, scope)),
        };
        rules.push(Rule::new([Statement::Verdict(next)]));
        rules
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

fn stem(by: By, scope: Scope) -> &'static str {
    match (by, scope) {
        (By::Address, Scope::Cluster) => "lb",
        (By::Address, Scope::Local) => "lb-local",
        (By::NodePort, Scope::Cluster) => "nodeport-lb",
        (By::NodePort, Scope::Local) => "nodeport-lb-local",
    }
}

/// Returns the name of the verdict map from a number of endpoints to its chain.
pub(super) fn by_count(by: By, scope: Scope) -> Name {
    format!("{}-by-count", stem(by, scope)).into()
}

/// The chains for one kind of frontends and endpoints.
pub(super) struct Balancing {
    /// The chains.
    pub chains: Vec<(Name, Chain)>,
    /// The elements of the map [`by_count`].
    pub elements: Vec<Element>,
}

/// Returns the chains for one kind of frontends and endpoints, the same in every table.
pub(super) fn balancing(by: By, scope: Scope) -> &'static Balancing {
    static OF_ADDRESSES: [LazyLock<Balancing>; 2] = [
        LazyLock::new(|| compile(By::Address, Scope::Cluster)),
        LazyLock::new(|| compile(By::Address, Scope::Local)),
    ];
    static OF_NODE_PORTS: [LazyLock<Balancing>; 2] = [
        LazyLock::new(|| compile(By::NodePort, Scope::Cluster)),
        LazyLock::new(|| compile(By::NodePort, Scope::Local)),
    ];
    let [cluster, local] = match by {
        By::Address => &OF_ADDRESSES,
        By::NodePort => &OF_NODE_PORTS,
    };
    match scope {
        Scope::Cluster => cluster,
        Scope::Local => local,
    }
}

fn compile(by: By, scope: Scope) -> Balancing {
    let (mut chains, mut elements) = (Vec::new(), Vec::new());
    for count in Count::all() {
        let (name, rules) = (count.chain(by, scope), count.rules(by, scope));
        let verdict = Verdict::Goto(name.clone());
        elements.push(Element::with_verdict(count.key(), verdict));
        chains.push((name, Chain { base: None, rules }));
    }
    elements.sort_by(|a, b| a.key.cmp(&b.key));
    Balancing { chains, elements }
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
    fn names_and_codes_show_the_number() {
        let name = |endpoints| Count::of(endpoints).chain(By::Address, Scope::Cluster);
        assert_eq!(name(64).as_str(), "lb-64");
        assert_eq!(name(65).as_str(), "lb-65-91");
        assert_eq!(name(92).as_str(), "lb-92-128");
        let code = |endpoints| Count::of(endpoints).code();
        assert_eq!([code(1), code(10), code(64)], [0x1, 0x10, 0x64]);
        assert_eq!([code(65), code(9000), code(20_000)], [0x91, 0xa011, 0xa023]);
    }
}
