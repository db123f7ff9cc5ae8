//! The pods that claim an address, and those of them that may have it.

use smallvec::SmallVec;

use crate::model::{Evidence, ObjectName, Sandbox};

/// A pod with the address in its status.
#[derive(Clone, Debug)]
pub(super) struct AddressClaimant {
    pub name: ObjectName,
    /// Whether the pod is on this node.
    pub local: bool,
    evidence: Evidence,
}

impl AddressClaimant {
    /// Returns whether the pod has no sandbox, so that the address in its status is outdated.
    pub fn is_gone(&self) -> bool {
        self.evidence.sandbox == Sandbox::Gone
    }
}

/// The claimants of one address, the latest sandboxes first.
#[derive(Clone, Debug, Default)]
pub(super) struct AddressClaimants {
    pub all: SmallVec<[AddressClaimant; 1]>,
}

impl AddressClaimants {
    /// Adds a pod.
    pub fn insert(&mut self, name: &ObjectName, evidence: Evidence, local: bool) {
        self.remove(name);
        let later = |it: &AddressClaimant| it.evidence.sandbox >= evidence.sandbox;
        let place = self.all.partition_point(later);
        let claimant = AddressClaimant {
            name: name.clone(),
            local,
            evidence,
        };
        self.all.insert(place, claimant);
    }

    /// Removes a pod.
    pub fn remove(&mut self, name: &ObjectName) {
        self.all.retain(|it| it.name != *name);
    }

    /// Returns whether none of them has a sandbox.
    pub(crate) fn are_all_gone(&self) -> bool {
        self.all.first().is_none_or(AddressClaimant::is_gone)
    }

    /// Returns the claimants that no other outranks ([`Evidence::outranks`]), among those for which
    /// `counts` returns true.
    pub fn holders<'a>(
        &'a self,
        counts: impl Fn(&AddressClaimant) -> bool + 'a,
    ) -> impl Iterator<Item = &'a AddressClaimant> {
        let mut ranking = Ranking::default();
        let counting = self.all.iter().filter(move |it| counts(it));
        counting.filter(move |it| ranking.add(it.evidence))
    }
}

/// The latest starts among the claimants so far. The list is sorted by sandbox, latest first.
#[derive(Default)]
struct Ranking {
    /// The latest start among claimants with a later sandbox; `None` without such claimants.
    latest_of_later_sandboxes: Option<Option<u32>>,
    /// The sandbox of the last claimant, and the latest start among those with the same one.
    of_this_sandbox: Option<(Sandbox, Option<u32>)>,
}

impl Ranking {
    /// Adds the next claimant. Returns whether none before it outranks it.
    fn add(&mut self, Evidence { sandbox, started }: Evidence) -> bool {
        match &mut self.of_this_sandbox {
            Some((of, latest)) if *of == sandbox => *latest = (*latest).max(started),
            _ => {
                let later = self.of_this_sandbox.replace((sandbox, started));
                let latest = later.map(|(_, latest)| latest);
                self.latest_of_later_sandboxes = self.latest_of_later_sandboxes.max(latest);
            }
        }
        self.latest_of_later_sandboxes
            .is_none_or(|latest| latest < started)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_evidence() -> impl Strategy<Value = Evidence> {
        let sandbox = prop_oneof![
            Just(Sandbox::Gone),
            Just(Sandbox::Unknown),
            (0..4u32).prop_map(Sandbox::RanAt),
        ];
        let started = prop::option::of(0..4u32);
        (sandbox, started).prop_map(|(sandbox, started)| Evidence { sandbox, started })
    }

    proptest! {
        #[test]
        fn holders_are_those_that_no_other_outranks(
            pods in prop::collection::vec((any_evidence(), any::<bool>()), 1..6),
        ) {
            let mut claimants = AddressClaimants::default();
            let name = |index: usize| ObjectName::new("shop", &index.to_string());
            for (index, (evidence, local)) in pods.iter().enumerate() {
                claimants.insert(&name(index), *evidence, *local);
            }
            for only_local in [false, true] {
                let counts = |local: bool| local || !only_local;
                let mut found: Vec<&ObjectName> = claimants
                    .holders(|it| counts(it.local))
                    .map(|it| &it.name)
                    .collect();
                found.sort_unstable();
                let counting = || pods.iter().filter(|(_, local)| counts(*local));
                let expected: Vec<ObjectName> = pods
                    .iter()
                    .enumerate()
                    .filter(|(_, (one, local))| {
                        counts(*local) && !counting().any(|(other, _)| other.outranks(one))
                    })
                    .map(|(index, _)| name(index))
                    .collect();
                prop_assert_eq!(found, expected.iter().collect::<Vec<_>>());
                prop_assert_eq!(counting().count() > 0, !expected.is_empty());
            }
        }
    }
}
