//! Sharing of values that many objects repeat.

use std::collections::HashSet;
use std::sync::Arc;

use crate::model::{Hints, Labels, NamedPort};

/// Shares equal strings, hints, and lists of labels and ports.
///
/// Thousands of endpoints have the same node names, zones and port names, and the pods of one
/// workload have the same labels and ports. Values without other references are dropped whenever
/// the tables have doubled, so that their size stays proportional to that of the cluster.
#[derive(Debug)]
pub(super) struct Interner {
    strings: HashSet<Arc<str>>,
    hints: HashSet<Arc<Hints>>,
    labels: HashSet<Labels>,
    ports: HashSet<Arc<[NamedPort]>>,
    sweep_at: usize,
}

/// Tables below this size are never swept.
const SMALLEST_SWEEP: usize = 1024;

impl Default for Interner {
    fn default() -> Self {
        Self {
            strings: HashSet::new(),
            hints: HashSet::new(),
            labels: HashSet::new(),
            ports: HashSet::new(),
            sweep_at: SMALLEST_SWEEP,
        }
    }
}

impl Interner {
    pub(super) fn string(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.strings.get(text) {
            return known.clone();
        }
        self.sweep_when_full();
        let new: Arc<str> = Arc::from(text);
        self.strings.insert(new.clone());
        new
    }

    pub(super) fn hints(&mut self, hints: Hints) -> Arc<Hints> {
        if let Some(known) = self.hints.get(&hints) {
            return known.clone();
        }
        self.sweep_when_full();
        let new = Arc::new(hints);
        self.hints.insert(new.clone());
        new
    }

    pub(super) fn labels<'a>(&mut self, pairs: impl Iterator<Item = (&'a str, &'a str)>) -> Labels {
        let pairs = pairs.map(|(key, value)| (self.string(key), self.string(value)));
        let new: Labels = pairs.collect();
        if let Some(known) = self.labels.get(&new) {
            return known.clone();
        }
        self.sweep_when_full();
        self.labels.insert(new.clone());
        new
    }

    pub(super) fn ports(&mut self, ports: Vec<NamedPort>) -> Arc<[NamedPort]> {
        if let Some(known) = self.ports.get(ports.as_slice()) {
            return known.clone();
        }
        self.sweep_when_full();
        let new: Arc<[NamedPort]> = Arc::from(ports);
        self.ports.insert(new.clone());
        new
    }

    fn len(&self) -> usize {
        self.strings.len() + self.hints.len() + self.labels.len() + self.ports.len()
    }

    fn sweep_when_full(&mut self) {
        if self.len() < self.sweep_at {
            return;
        }
        // Strings last, since the others refer to them.
        self.hints.retain(|hints| Arc::strong_count(hints) > 1);
        self.labels.retain(Labels::is_shared);
        self.ports.retain(|ports| Arc::strong_count(ports) > 1);
        self.strings.retain(|text| Arc::strong_count(text) > 1);
        self.sweep_at = SMALLEST_SWEEP.max(2 * self.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Protocol;

    #[test]
    fn equal_strings_and_hints_are_shared() {
        let mut interner = Interner::default();
        let first = interner.string("zone-a");
        assert!(Arc::ptr_eq(&first, &interner.string("zone-a")));
        let hints = Hints {
            zones: Some([first].into()),
            nodes: None,
        };
        let shared = interner.hints(hints.clone());
        assert!(Arc::ptr_eq(&shared, &interner.hints(hints)));
    }

    #[test]
    fn equal_labels_and_ports_are_shared() {
        let mut interner = Interner::default();
        let labels = interner.labels([("app", "web"), ("tier", "front")].into_iter());
        let known = interner.len();
        let again = interner.labels([("tier", "front"), ("app", "web")].into_iter());
        assert_eq!(labels, again);
        let value = |labels: &Labels| labels.get("app").cloned().expect("the label");
        assert!(Arc::ptr_eq(&value(&labels), &value(&again)));
        assert_eq!(interner.len(), known, "one copy of the list");
        let named = |interner: &mut Interner| NamedPort {
            name: interner.string("http"),
            protocol: Protocol::Tcp,
            port: 80,
        };
        let ports = vec![named(&mut interner)];
        let first = interner.ports(ports.clone());
        assert!(Arc::ptr_eq(&first, &interner.ports(ports)));
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

    #[test]
    fn labels_and_ports_out_of_use_are_dropped_with_their_strings() {
        let mut interner = Interner::default();
        let kept = interner.labels([("app", "kept")].into_iter());
        for number in 0..10 * SMALLEST_SWEEP {
            let number = number.to_string();
            interner.labels([("pod", number.as_str())].into_iter());
            let name = interner.string(&number);
            interner.ports(vec![NamedPort {
                name,
                protocol: Protocol::Tcp,
                port: 80,
            }]);
        }
        assert!(interner.len() <= 2 * SMALLEST_SWEEP, "{}", interner.len());
        assert!(interner.labels.contains(&kept));
    }
}
