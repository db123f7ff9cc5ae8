//! `nftlet diff` for random clusters: what it says of reachability is what `nftlet reach` says of both
//! sides, and nothing differs from itself.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::support::policy::generate::{self, Random, Shape};

const SHAPE: Shape = Shape::SMALL;
const CLUSTERS: u64 = 20;

fn nftlet(words: &[&str]) -> Output {
    let mut nftlet = Command::new(env!("CARGO_BIN_EXE_nftlet"));
    nftlet.args(words).env_remove("NODE_NAME");
    nftlet.output().expect("nftlet runs")
}

/// Returns the connections of each pair of workloads that can connect.
fn reach(path: &str) -> BTreeMap<(String, String), String> {
    let output = nftlet(&["reach", "-o=lines", "--manifests", path]);
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let pairs = lines.map(|line| {
        let (ends, connections) = line.split_once(" : ").expect("two parts");
        let (from, to) = ends.split_once(" => ").expect("two ends");
        ((from.to_owned(), to.to_owned()), connections.to_owned())
    });
    pairs.collect()
}

fn write(path: &Path, items: &[Value]) {
    let list = json!({ "apiVersion": "v1", "kind": "List", "items": items });
    std::fs::write(path, list.to_string()).expect("a file");
}

/// Returns whether a workload is a name, or in the namespace of this name.
fn is_in(workload: &str, name: &str) -> bool {
    workload == name || workload.split_once('/').is_some_and(|(of, _)| of == name)
}

#[test]
fn differences_agree_with_reach_of_both_sides() {
    let directory = tempfile::tempdir().expect("a directory");
    let files = ["a.json", "b.json"].map(|name| directory.path().join(name));
    let paths = files.each_ref().map(|path| path.to_str().expect("UTF-8"));
    let (mut all, mut joined) = (0, 0);
    for seed in 0..CLUSTERS {
        let mut random = Random::new(11_000 + seed);
        let cluster = generate::cluster(&mut random, &SHAPE);
        let mut objects = generate::manifests(&cluster);
        write(&files[0], &objects);
        let same = nftlet(&["diff", paths[0], paths[0], "--hostname-override=node-1"]);
        assert_eq!(same.status.code(), Some(0), "seed {seed}: {same:?}");
        objects.retain(|object| {
            let is_policy = object["kind"]
                .as_str()
                .is_some_and(|it| it.contains("Policy"));
            !is_policy || random.percent(60)
        });
        write(&files[1], &objects);
        let output = nftlet(&["diff", paths[0], paths[1], "-o=json"]);
        let diff: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        if diff["notCompared"].to_string().contains("reachability") {
            continue;
        }
        let sides = paths.map(reach);
        let pairs: BTreeSet<_> = sides.iter().flat_map(BTreeMap::keys).collect();
        let pairs = pairs.into_iter();
        let wanted: BTreeMap<_, _> = pairs
            .map(|pair| {
                let none = || "No Connections".to_owned();
                let words = sides
                    .each_ref()
                    .map(|side| side.get(pair).cloned().unwrap_or_else(none));
                (pair.clone(), words)
            })
            .collect();
        let mut found = BTreeMap::new();
        for change in diff["reachability"].as_array().expect("a list") {
            let word = |field: &str| change[field].as_str().expect("words").to_owned();
            let (from, to) = (word("from"), word("to"));
            let words = [word("before"), word("after")];
            assert_ne!(words[0], words[1], "{change}");
            let of = wanted.iter().filter(|((source, destination), _)| {
                is_in(source, &from) && is_in(destination, &to)
            });
            let mut any = false;
            for (pair, wanted) in of {
                assert_eq!(*wanted, words, "{pair:?} of {change}, seed {seed}");
                assert!(
                    found.insert(pair.clone(), words.clone()).is_none(),
                    "{pair:?} twice"
                );
                any = true;
            }
            assert!(any, "{change}, seed {seed}");
            joined += usize::from(!from.contains('/') || !to.contains('/'));
        }
        let differ = wanted
            .into_iter()
            .filter(|(_, [before, after])| before != after);
        let differ: BTreeMap<_, _> = differ.collect();
        assert_eq!(found, differ, "seed {seed}");
        all += differ.len();
    }
    assert!(all > 100 && joined > 0, "{all} pairs, {joined} joined");
}
