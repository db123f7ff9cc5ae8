//! Whether the kernel holds what the objects ask for.
//!
//! The objects that the API server has in the end are read as manifests, by the same code that reads them from
//! its answers, and compiled from scratch. Two things may be other than in the kernel, whose rules
//! have a history: which index an endpoint has, and shared chains that are no longer used, which
//! stay for a minute. So the indexes of each frontend are checked to be without a gap and then given
//! anew in the order of the endpoints, and chains that only the kernel has must not be in use.

use std::collections::{BTreeMap, BTreeSet};

use nftlet::compile::{DetectLocal, Settings, TABLE};
use nftlet::model::{Changes, Event, Store};
use nftlet::netlink::Nftables;
use nftlet::ruleset::{
    Element, Key, Name, Ruleset, Selector, Set, Table, Transaction, Value, diff,
};
use nftlet::source::Manifests;
use serde_json::json;

use crate::cluster::POD_CIDRS;
use crate::fake_api::{CIDRS, FakeApi, NODES, SERVICES, SLICES};
use crate::netns::Namespace;
use crate::workload::NODE;

/// The operations that would make the kernel as wanted: none, if all is well.
pub fn difference(node: &Namespace, api: &FakeApi) -> Transaction {
    let mut wanted = wanted(api);
    let read = node.run(|| Nftables::open()?.read(&[TABLE], &wanted));
    let mut held = read.unwrap_or_else(|error| panic!("the rules cannot be read: {error}"));
    for (id, table) in &mut held.tables {
        if let Some(wanted) = wanted.tables.get(id) {
            remove_unused_chains(table, wanted);
        }
    }
    for ruleset in [&mut held, &mut wanted] {
        let sets = ruleset
            .tables
            .values_mut()
            .flat_map(|table| table.sets.values_mut());
        sets.for_each(number_anew);
    }
    diff(&held, wanted)
}

/// The rules that the objects of a server ask for.
fn wanted(api: &FakeApi) -> Ruleset {
    let collections = [NODES, CIDRS, SERVICES, SLICES].into_iter();
    let items: Vec<_> = collections.flat_map(|path| api.objects(path)).collect();
    let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("objects.json");
    std::fs::write(&file, list.to_string()).expect("a file is written");
    let source = Manifests::new(vec![file], NODE.to_owned());
    let events = source.with_network_policies(false).load();
    let (mut store, mut changes) = (Store::default(), Changes::default());
    for event in events.unwrap_or_else(|error| panic!("{error}")) {
        if let Event::Notice(notice) = &event {
            panic!("{}: {}", notice.subject, notice.message);
        }
        store.apply(event, &mut changes);
    }
    let cidrs = POD_CIDRS
        .split(',')
        .map(|cidr| cidr.parse().expect("a range"));
    let settings = Settings {
        detect_local: DetectLocal::ClusterCidr(cidrs.collect()),
        ..Settings::default()
    };
    nftlet::compile::wanted(&store, &settings).0
}

/// Takes away the chains that are not wanted and to which no element leads.
fn remove_unused_chains(held: &mut Table, wanted: &Table) {
    let elements = held.sets.values().flat_map(|set| &set.elements);
    let used: BTreeSet<Name> = elements
        .filter_map(|element| match &element.value {
            Value::Verdict(verdict) => verdict.target().cloned(),
            Value::None | Value::Data(_) => None,
        })
        .collect();
    held.chains
        .retain(|name, _| wanted.chains.contains_key(name) || used.contains(name));
}

/// Gives the endpoints of each frontend the indexes of their order. Where there is a gap the set
/// stays as it is, and so differs.
fn number_anew(set: &mut Set) {
    if !matches!(
        set.declaration.key.last(),
        Some(Selector::RandomIndex { .. })
    ) {
        return;
    }
    let mut frontends: BTreeMap<&[u8], Vec<(u32, &Value)>> = BTreeMap::new();
    for element in &set.elements {
        let (frontend, index) = element.key.as_bytes().split_last_chunk().expect("an index");
        let endpoint = (u32::from_ne_bytes(*index), &element.value);
        frontends.entry(frontend).or_default().push(endpoint);
    }
    let mut elements = Vec::with_capacity(set.elements.len());
    for (frontend, mut endpoints) in frontends {
        endpoints.sort_unstable();
        if !(0..)
            .zip(&endpoints)
            .all(|(index, (found, _))| index == *found)
        {
            return;
        }
        let mut values: Vec<&Value> = endpoints.into_iter().map(|(_, value)| value).collect();
        values.sort_unstable();
        for (index, value) in (0_u32..).zip(values) {
            let key = Key::from_bytes(&[frontend, &index.to_ne_bytes()].concat());
            elements.push(Element {
                value: value.clone(),
                ..Element::new(key)
            });
        }
    }
    elements.sort_unstable();
    set.elements = elements;
}
