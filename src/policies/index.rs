//! Finds the selectors that select a pod by the pod's labels.
//!
//! A selector is indexed by one label that every selected pod must have (its *anchor*): the values
//! of an `In`, else the key of an `Exists`. A lookup tests only the selectors at the labels of the
//! pod. The few selectors without an anchor (everything, `NotIn`, `DoesNotExist`) are indexed by
//! the namespaces that they select. So the cost of a lookup depends on the number of the pod's
//! labels and not on the number of selectors.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use crate::model::{LabelSelector, Labels, NAMESPACE_NAME, Requirement};

/// Selects pods by their labels and namespaces. Equal selectors of different policies are equal.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct PodSelector {
    pub namespaces: Namespaces,
    /// The pods in these namespaces.
    pub pods: LabelSelector,
}

/// Selects namespaces by name or by labels.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Namespaces {
    /// The namespace with this name.
    Named(Arc<str>),
    /// The namespaces with these labels.
    Labelled(LabelSelector),
}

impl Namespaces {
    /// Returns the namespaces of a `namespaceSelector`, in a policy of namespace `own`.
    pub fn new(selector: Option<&LabelSelector>, own: &str) -> Self {
        match selector {
            None => Namespaces::Named(own.into()),
            Some(selector) => match only_namespace(selector) {
                Some(name) => Namespaces::Named(name.clone()),
                None => Namespaces::Labelled(selector.clone()),
            },
        }
    }

    /// Returns whether a namespace is selected.
    pub fn contain(&self, name: &str, labels: &Labels) -> bool {
        match self {
            Namespaces::Named(own) => **own == *name,
            Namespaces::Labelled(selector) => selector.matches(labels),
        }
    }
}

/// Returns the namespace that a selector names in the usual way: by the label that the API server sets.
pub(super) fn only_namespace(selector: &LabelSelector) -> Option<&Arc<str>> {
    match selector.requirements() {
        [Requirement::In(key, names)] if &**key == NAMESPACE_NAME => match names.as_slice() {
            [name] => Some(name),
            _ => None,
        },
        _ => None,
    }
}

impl PodSelector {
    /// Returns the selector of pods with some labels in namespaces with some labels.
    pub fn new(namespaces: &LabelSelector, pods: &LabelSelector) -> Self {
        Self {
            namespaces: Namespaces::new(Some(namespaces), ""),
            pods: pods.clone(),
        }
    }

    /// Returns whether a pod is selected, given its labels and those of its namespace.
    pub fn matches(&self, namespace: &str, of_namespace: &Labels, of_pod: &Labels) -> bool {
        self.namespaces.contain(namespace, of_namespace) && self.pods.matches(of_pod)
    }

    /// Returns the label that all selected pods have.
    fn anchor(&self) -> Option<Anchor<'_>> {
        let requirements = self.pods.requirements();
        let one_of = requirements
            .iter()
            .find_map(|requirement| match requirement {
                Requirement::In(key, values) => Some(Anchor::Values(key, values)),
                _ => None,
            });
        one_of.or_else(|| {
            requirements
                .iter()
                .find_map(|requirement| match requirement {
                    Requirement::Exists(key) => Some(Anchor::Key(key)),
                    _ => None,
                })
        })
    }
}

enum Anchor<'a> {
    Values(&'a Arc<str>, &'a [Arc<str>]),
    Key(&'a Arc<str>),
}

/// An index of selectors, each with an identifier.
#[derive(Debug)]
pub(crate) struct Index<Id> {
    by_key: HashMap<Arc<str>, OfKey<Id>>,
    /// Selectors without an anchor.
    unanchored: BTreeMap<Id, Unanchored>,
    /// Selectors without an anchor by the namespaces that they select.
    of_namespace: HashMap<Arc<str>, BTreeSet<Id>>,
    /// How many selectors select namespaces by these labels.
    namespaces: HashMap<LabelSelector, usize>,
}

#[derive(Debug)]
struct Unanchored {
    selector: PodSelector,
    /// The namespaces under which it is indexed.
    filed: BTreeSet<Arc<str>>,
}

#[derive(Debug)]
struct OfKey<Id> {
    any_value: Filed<Id>,
    values: HashMap<Arc<str>, Filed<Id>>,
}

/// The selectors at one label.
#[derive(Debug)]
struct Filed<Id> {
    /// Selectors of one namespace, by its name.
    named: HashMap<Arc<str>, Vec<(Id, LabelSelector)>>,
    /// Selectors of namespaces by their labels.
    labelled: Vec<(Id, LabelSelector, LabelSelector)>,
}

impl<Id> Default for Index<Id> {
    fn default() -> Self {
        Self {
            by_key: HashMap::new(),
            unanchored: BTreeMap::new(),
            of_namespace: HashMap::new(),
            namespaces: HashMap::new(),
        }
    }
}

impl<Id> Default for OfKey<Id> {
    fn default() -> Self {
        Self {
            any_value: Filed::default(),
            values: HashMap::new(),
        }
    }
}

impl<Id> Default for Filed<Id> {
    fn default() -> Self {
        Self {
            named: HashMap::new(),
            labelled: Vec::new(),
        }
    }
}

impl<Id: Clone + Ord> Index<Id> {
    /// Adds a selector. `namespaces` are the known namespaces with their labels.
    pub fn insert<'n>(
        &mut self,
        id: Id,
        selector: &PodSelector,
        namespaces: impl IntoIterator<Item = (&'n str, Labels)>,
    ) {
        if let Namespaces::Labelled(labels) = &selector.namespaces {
            *self.namespaces.entry(labels.clone()).or_default() += 1;
        }
        match selector.anchor() {
            Some(Anchor::Values(key, values)) => {
                let of_key = self.by_key.entry(key.clone()).or_default();
                for value in values {
                    let filed = of_key.values.entry(value.clone()).or_default();
                    filed.insert(id.clone(), selector);
                }
            }
            Some(Anchor::Key(key)) => {
                let of_key = self.by_key.entry(key.clone()).or_default();
                of_key.any_value.insert(id, selector);
            }
            None => {
                let selector = selector.clone();
                let mut filed = BTreeSet::new();
                match &selector.namespaces {
                    Namespaces::Named(name) => {
                        filed.insert(name.clone());
                    }
                    Namespaces::Labelled(labels) => {
                        let selected = namespaces.into_iter().filter(|(_, of)| labels.matches(of));
                        filed.extend(selected.map(|(name, _)| Arc::from(name)));
                    }
                }
                for namespace in &filed {
                    let ids = self.of_namespace.entry(namespace.clone()).or_default();
                    ids.insert(id.clone());
                }
                self.unanchored.insert(id, Unanchored { selector, filed });
            }
        }
    }

    /// Returns whether there are no selectors.
    pub fn is_empty(&self) -> bool {
        self.by_key.is_empty() && self.unanchored.is_empty()
    }

    pub fn remove(&mut self, id: &Id, selector: &PodSelector) {
        if let Namespaces::Labelled(labels) = &selector.namespaces
            && let Some(count) = self.namespaces.get_mut(labels)
        {
            *count -= 1;
            if *count == 0 {
                self.namespaces.remove(labels);
            }
        }
        match selector.anchor() {
            Some(Anchor::Values(key, values)) => {
                let Some(of_key) = self.by_key.get_mut(key) else {
                    return;
                };
                for value in values {
                    if let Some(filed) = of_key.values.get_mut(value) {
                        filed.remove(id, selector);
                        if filed.is_empty() {
                            of_key.values.remove(value);
                        }
                    }
                }
                self.drop_empty(key);
            }
            Some(Anchor::Key(key)) => {
                if let Some(of_key) = self.by_key.get_mut(key) {
                    of_key.any_value.remove(id, selector);
                }
                self.drop_empty(key);
            }
            None => {
                let unanchored = self.unanchored.remove(id);
                for namespace in unanchored.into_iter().flat_map(|it| it.filed) {
                    if let Some(ids) = self.of_namespace.get_mut(&namespace) {
                        ids.remove(id);
                        if ids.is_empty() {
                            self.of_namespace.remove(&namespace);
                        }
                    }
                }
            }
        }
    }

    fn drop_empty(&mut self, key: &str) {
        let of_key = self.by_key.get(key);
        if of_key.is_some_and(|of| of.any_value.is_empty() && of.values.is_empty()) {
            self.by_key.remove(key);
        }
    }

    /// Returns whether some selector selects a namespace with only one of two sets of labels.
    pub(crate) fn distinguishes(&self, before: &Labels, after: &Labels) -> bool {
        let mut selectors = self.namespaces.keys();
        selectors.any(|selector| selector.matches(before) != selector.matches(after))
    }

    /// Updates the index after a namespace was created, got other labels, or was deleted (`None`).
    /// Selectors that name it are kept, since a pod may be added before its namespace.
    pub(crate) fn namespace_changed(&mut self, name: &str, labels: Option<&Labels>) {
        let mut ids = BTreeSet::new();
        let name: Arc<str> = name.into();
        for (id, Unanchored { selector, filed }) in &mut self.unanchored {
            let selects = match (&selector.namespaces, labels) {
                (Namespaces::Named(own), _) => *own == name,
                (Namespaces::Labelled(selector), Some(labels)) => selector.matches(labels),
                (Namespaces::Labelled(_), None) => false,
            };
            if selects {
                filed.insert(name.clone());
                ids.insert(id.clone());
            } else {
                filed.remove(&name);
            }
        }
        if ids.is_empty() {
            self.of_namespace.remove(&name);
        } else {
            self.of_namespace.insert(name, ids);
        }
    }

    /// Calls `found` once for each selector that selects a pod, in no order.
    ///
    /// The labels of the namespace must be those of the last call of [`Index::namespace_changed`].
    pub fn of_pod(
        &self,
        namespace: &str,
        of_namespace: &Labels,
        of_pod: &Labels,
        mut found: impl FnMut(&Id),
    ) {
        for id in self.of_namespace.get(namespace).into_iter().flatten() {
            let unanchored = self.unanchored.get(id);
            if unanchored.is_some_and(|it| it.selector.pods.matches(of_pod)) {
                found(id);
            }
        }
        for (key, value) in of_pod.iter() {
            let Some(of_key) = self.by_key.get(key) else {
                continue;
            };
            let filed = [Some(&of_key.any_value), of_key.values.get(value)];
            for filed in filed.into_iter().flatten() {
                filed.of_pod(namespace, of_namespace, of_pod, &mut found);
            }
        }
    }
}

impl<Id: Clone + Ord> Filed<Id> {
    fn insert(&mut self, id: Id, selector: &PodSelector) {
        let pods = selector.pods.clone();
        match &selector.namespaces {
            Namespaces::Named(name) => {
                let of_namespace = self.named.entry(name.clone()).or_default();
                of_namespace.push((id, pods));
            }
            Namespaces::Labelled(labels) => self.labelled.push((id, labels.clone(), pods)),
        }
    }

    fn remove(&mut self, id: &Id, selector: &PodSelector) {
        match &selector.namespaces {
            Namespaces::Named(name) => {
                if let Some(of_namespace) = self.named.get_mut(name) {
                    of_namespace.retain(|(known, _)| known != id);
                    if of_namespace.is_empty() {
                        self.named.remove(name);
                    }
                }
            }
            Namespaces::Labelled(_) => self.labelled.retain(|(known, ..)| known != id),
        }
    }

    fn is_empty(&self) -> bool {
        self.named.is_empty() && self.labelled.is_empty()
    }

    fn of_pod(
        &self,
        namespace: &str,
        of_namespace: &Labels,
        of_pod: &Labels,
        found: &mut impl FnMut(&Id),
    ) {
        for (id, pods) in self.named.get(namespace).into_iter().flatten() {
            if pods.matches(of_pod) {
                found(id);
            }
        }
        for (id, namespaces, pods) in &self.labelled {
            if namespaces.matches(of_namespace) && pods.matches(of_pod) {
                found(id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn labels() -> impl Strategy<Value = Labels> {
        let label = ("[abc]", "[xyz]");
        prop::collection::vec(label, 0..4).prop_map(|labels| labels.into_iter().collect())
    }

    fn selector() -> impl Strategy<Value = LabelSelector> {
        let values = prop::collection::vec("[xyz]".prop_map(Arc::<str>::from), 1..3);
        let requirement = (0..4, "[abc]", values).prop_map(|(sort, key, values)| {
            let key = key.into();
            match sort {
                0 => Requirement::In(key, values),
                1 => Requirement::NotIn(key, values),
                2 => Requirement::Exists(key),
                _ => Requirement::DoesNotExist(key),
            }
        });
        prop::collection::vec(requirement, 0..3).prop_map(LabelSelector::new)
    }

    fn pod_selector() -> impl Strategy<Value = PodSelector> {
        let namespaces = prop_oneof![
            "[mn]".prop_map(|name| Namespaces::Named(name.into())),
            selector().prop_map(Namespaces::Labelled),
        ];
        (namespaces, selector()).prop_map(|(namespaces, pods)| PodSelector { namespaces, pods })
    }

    proptest! {
        #[test]
        fn finds_just_what_matches(
            selectors in prop::collection::vec((pod_selector(), any::<bool>()), 0..12),
            early in labels(),
            late in labels(),
            pod in labels(),
        ) {
            let mut index = Index::default();
            let none = Labels::default();
            // One namespace is relabelled while half of the selectors are filed.
            let half = selectors.len() / 2;
            for (id, (selector, _)) in selectors.iter().enumerate().take(half) {
                index.insert(id, selector, [("m", early.clone()), ("n", none.clone())]);
            }
            index.namespace_changed("m", Some(&late));
            for (id, (selector, _)) in selectors.iter().enumerate().skip(half) {
                index.insert(id, selector, [("m", late.clone()), ("n", none.clone())]);
            }
            for (id, (selector, stays)) in selectors.iter().enumerate() {
                if !stays {
                    index.remove(&id, selector);
                }
            }
            for (namespace, of_namespace) in [("m", &late), ("n", &none)] {
                let mut found = Vec::new();
                index.of_pod(namespace, of_namespace, &pod, |id| found.push(*id));
                found.sort_unstable();
                let wanted: Vec<usize> = (0..selectors.len())
                    .filter(|id| selectors[*id].1)
                    .filter(|id| selectors[*id].0.matches(namespace, of_namespace, &pod))
                    .collect();
                prop_assert_eq!(found, wanted);
            }
            if selectors.iter().all(|(_, stays)| !stays) {
                prop_assert!(index.is_empty() && index.of_namespace.is_empty());
                prop_assert!(index.namespaces.is_empty());
            }
        }
    }

    #[test]
    fn a_namespace_is_named_in_two_ways() {
        let by_label =
            LabelSelector::new([Requirement::In(NAMESPACE_NAME.into(), vec!["shop".into()])]);
        assert_eq!(
            Namespaces::new(Some(&by_label), "other"),
            Namespaces::new(None, "shop")
        );
    }

    #[test]
    fn a_deleted_namespace_leaves_nothing() {
        let mut index = Index::default();
        let everything = PodSelector {
            namespaces: Namespaces::Labelled(LabelSelector::default()),
            pods: LabelSelector::default(),
        };
        let named = PodSelector {
            namespaces: Namespaces::Named("m".into()),
            ..everything.clone()
        };
        index.insert(1, &everything, []);
        index.insert(2, &named, []);
        let none = Labels::default();
        for name in ["m", "n"] {
            index.namespace_changed(name, Some(&none));
        }
        assert_eq!(index.of_namespace.len(), 2);
        for name in ["m", "n"] {
            index.namespace_changed(name, None);
        }
        assert_eq!(index.of_namespace.len(), 1);
        assert!(index.unanchored[&1].filed.is_empty());
        let mut found = Vec::new();
        index.of_pod("m", &none, &none, |id| found.push(*id));
        assert_eq!(found, [2], "a pod may come before its namespace");
        index.remove(&2, &named);
        assert!(index.of_namespace.is_empty());
    }
}
