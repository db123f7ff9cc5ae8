//! Sets of destination ports, each kept once.

use std::collections::HashMap;
use std::fmt;

use crate::model::Protocol;

/// The protocols that have ports.
pub(super) const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
/// All ports of a protocol.
pub(super) const ALL_PORTS: (u16, u16) = (1, u16::MAX);

/// The first and the last port of each range, sorted and apart from each other.
type Ranges = Vec<(u16, u16)>;

/// What can be connected to: ports of each protocol, and the protocols without ports.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct PortSet {
    /// In the order of [`PROTOCOLS`].
    ranges: [Ranges; 3],
    /// ICMP, and every other protocol without ports.
    icmp: bool,
}

impl PortSet {
    /// Returns the set of everything.
    pub fn all() -> Self {
        Self {
            ranges: [vec![ALL_PORTS], vec![ALL_PORTS], vec![ALL_PORTS]],
            icmp: true,
        }
    }

    /// Returns the set of ICMP.
    pub fn icmp() -> Self {
        Self {
            icmp: true,
            ..Self::default()
        }
    }

    /// Adds ports of a protocol; `None` adds ICMP.
    pub fn add(&mut self, protocol: Option<Protocol>, range: Option<(u16, u16)>) {
        let (Some(protocol), Some(range)) = (protocol, range) else {
            self.icmp = true;
            return;
        };
        for (of, ranges) in PROTOCOLS.iter().zip(&mut self.ranges) {
            if *of == protocol {
                *ranges = union(ranges, &[range]);
            }
        }
    }

    pub fn is_empty(&self) -> bool {
        !self.icmp && self.ranges.iter().all(Vec::is_empty)
    }

    /// Returns what both sets have.
    pub fn intersection(&self, other: &Self) -> Self {
        let [a, b, c] = &self.ranges;
        let [x, y, z] = &other.ranges;
        Self {
            ranges: [intersection(a, x), intersection(b, y), intersection(c, z)],
            icmp: self.icmp && other.icmp,
        }
    }

    /// Returns what one of both sets has.
    pub fn union(&self, other: &Self) -> Self {
        let [a, b, c] = &self.ranges;
        let [x, y, z] = &other.ranges;
        Self {
            ranges: [union(a, x), union(b, y), union(c, z)],
            icmp: self.icmp || other.icmp,
        }
    }

    /// Returns it in words: what it lacks, if that is shorter.
    pub fn words(&self) -> String {
        let has = self.to_string();
        let [a, b, c] = &self.ranges;
        let others = Self {
            ranges: [a, b, c].map(complement),
            icmp: !self.icmp,
        };
        let lacks = others.to_string();
        if self.is_empty() || others.is_empty() || has.len() <= lacks.len() {
            return has;
        }
        format!("all but {lacks}")
    }

    /// Returns whether all of another set is in this one.
    pub fn contains(&self, other: &Self) -> bool {
        self.intersection(other) == *other
    }
}

fn intersection(one: &Ranges, other: &Ranges) -> Ranges {
    let mut both = Ranges::new();
    for (first, last) in one {
        for (from, to) in other {
            let (begin, end) = (*first.max(from), *last.min(to));
            if begin <= end {
                both.push((begin, end));
            }
        }
    }
    both
}

fn union(one: &[(u16, u16)], other: &[(u16, u16)]) -> Ranges {
    let mut all: Ranges = one.iter().chain(other).copied().collect();
    all.sort_unstable();
    let mut joined: Ranges = Vec::new();
    for (first, last) in all {
        match joined.last_mut() {
            Some((_, end)) if end.checked_add(1).is_none_or(|next| first <= next) => {
                *end = last.max(*end);
            }
            _ => joined.push((first, last)),
        }
    }
    joined
}

fn complement(ranges: &Ranges) -> Ranges {
    let mut others = Ranges::new();
    let mut next = Some(ALL_PORTS.0);
    for (first, last) in ranges {
        if let Some(begin) = next.filter(|begin| begin < first) {
            others.push((begin, first.saturating_sub(1)));
        }
        next = last.checked_add(1);
    }
    others.extend(next.map(|begin| (begin, ALL_PORTS.1)));
    others
}

impl fmt::Display for PortSet {
    /// Writes `TCP 80,8000-8080,UDP 53`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::all() {
            return f.write_str("All Connections");
        }
        if self.is_empty() {
            return f.write_str("No Connections");
        }
        let mut comma = "";
        for (protocol, ranges) in PROTOCOLS.iter().zip(&self.ranges) {
            for (index, (first, last)) in ranges.iter().enumerate() {
                f.write_str(comma)?;
                comma = ",";
                if index == 0 {
                    write!(f, "{protocol} ")?;
                }
                match first == last {
                    true => write!(f, "{first}")?,
                    false => write!(f, "{first}-{last}")?,
                }
            }
        }
        if self.icmp {
            write!(f, "{comma}ICMP")?;
        }
        Ok(())
    }
}

/// A set in [`PortSets`]; equal sets have the same one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SetId(u32);

impl SetId {
    pub const NONE: Self = Self(0);
    pub const ALL: Self = Self(1);
}

/// Distinct sets, with what their combinations are.
#[derive(Debug)]
pub(super) struct PortSets {
    sets: Vec<PortSet>,
    ids: HashMap<PortSet, SetId>,
    intersections: HashMap<(SetId, SetId), SetId>,
    unions: HashMap<(SetId, SetId), SetId>,
}

impl PortSets {
    pub fn new() -> Self {
        let mut sets = Self {
            sets: Vec::new(),
            ids: HashMap::new(),
            intersections: HashMap::new(),
            unions: HashMap::new(),
        };
        sets.id(PortSet::default());
        sets.id(PortSet::all());
        sets
    }

    pub fn id(&mut self, set: PortSet) -> SetId {
        if let Some(id) = self.ids.get(&set) {
            return *id;
        }
        let id = SetId(u32::try_from(self.sets.len()).unwrap_or(u32::MAX));
        self.sets.push(set.clone());
        self.ids.insert(set, id);
        id
    }

    pub fn get(&self, id: SetId) -> PortSet {
        let set = usize::try_from(id.0).ok().and_then(|at| self.sets.get(at));
        set.cloned().unwrap_or_default()
    }

    pub fn intersection(&mut self, one: SetId, other: SetId) -> SetId {
        match (one, other) {
            (SetId::NONE, _) | (_, SetId::NONE) => return SetId::NONE,
            (SetId::ALL, it) | (it, SetId::ALL) => return it,
            _ if one == other => return one,
            _ => {}
        }
        let key = (one.min(other), one.max(other));
        if let Some(known) = self.intersections.get(&key) {
            return *known;
        }
        let both = self.get(one).intersection(&self.get(other));
        let id = self.id(both);
        self.intersections.insert(key, id);
        id
    }

    pub fn union(&mut self, one: SetId, other: SetId) -> SetId {
        match (one, other) {
            (SetId::ALL, _) | (_, SetId::ALL) => return SetId::ALL,
            (SetId::NONE, it) | (it, SetId::NONE) => return it,
            _ if one == other => return one,
            _ => {}
        }
        let key = (one.min(other), one.max(other));
        if let Some(known) = self.unions.get(&key) {
            return *known;
        }
        let either = self.get(one).union(&self.get(other));
        let id = self.id(either);
        self.unions.insert(key, id);
        id
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tcp(ranges: &[(u16, u16)]) -> PortSet {
        let mut set = PortSet::default();
        for range in ranges {
            set.add(Some(Protocol::Tcp), Some(*range));
        }
        set
    }

    #[test]
    fn sets_are_written_in_one_line() {
        let mut set = tcp(&[(443, 443), (80, 80), (8000, 8080)]);
        set.add(Some(Protocol::Udp), Some((53, 53)));
        assert_eq!(set.to_string(), "TCP 80,443,8000-8080,UDP 53");
        set.add(None, None);
        assert_eq!(set.to_string(), "TCP 80,443,8000-8080,UDP 53,ICMP");
        assert_eq!(PortSet::all().to_string(), "All Connections");
        assert_eq!(PortSet::default().to_string(), "No Connections");
        assert_eq!(PortSet::icmp().to_string(), "ICMP");
        assert_eq!(set.words(), set.to_string());
        assert_eq!(PortSet::all().words(), "All Connections");
        assert_eq!(PortSet::default().words(), "No Connections");
        let mut most = tcp(&[(1, 79), (81, 8080), (8082, 65_535)]);
        most.add(Some(Protocol::Udp), Some((1, 65_535)));
        most.add(None, None);
        assert_eq!(most.words(), "all but TCP 80,8081,SCTP 1-65535");
    }

    fn any_ranges() -> impl Strategy<Value = Vec<(u16, u16)>> {
        let port = prop_oneof![Just(1), 1..20u16, Just(65_534), Just(65_535)];
        let range = (port.clone(), port).prop_map(|(a, b)| (a.min(b), a.max(b)));
        prop::collection::vec(range, 0..4)
    }

    proptest! {
        #[test]
        fn sets_are_combined_port_by_port(one in any_ranges(), other in any_ranges()) {
            let has = |ranges: &[(u16, u16)], port: u16| {
                ranges.iter().any(|(first, last)| (*first..=*last).contains(&port))
            };
            let [a, b] = [tcp(&one), tcp(&other)];
            let (both, either) = (a.intersection(&b), a.union(&b));
            for port in (1..25).chain(65_530..=65_535) {
                let single = tcp(&[(port, port)]);
                let (x, y) = (has(&one, port), has(&other, port));
                prop_assert_eq!(a.contains(&single), x);
                prop_assert_eq!(both.contains(&single), x && y);
                prop_assert_eq!(either.contains(&single), x || y);
            }
            prop_assert!(either.contains(&both));
        }

        #[test]
        fn each_set_is_kept_once(one in any_ranges(), other in any_ranges()) {
            let mut sets = PortSets::new();
            let ids = [&one, &other].map(|ranges| sets.id(tcp(ranges)));
            prop_assert_eq!(ids[0] == ids[1], tcp(&one) == tcp(&other));
            for (a, b) in [(ids[0], ids[1]), (SetId::ALL, ids[0]), (ids[1], SetId::NONE)] {
                for _ in 0..2 {
                    let both = sets.intersection(a, b);
                    prop_assert_eq!(sets.get(both), sets.get(a).intersection(&sets.get(b)));
                    let either = sets.union(a, b);
                    prop_assert_eq!(sets.get(either), sets.get(a).union(&sets.get(b)));
                }
            }
        }
    }
}
