//! `nftlet explain` for random clusters: its answers are those of the independent judge, and
//! the rules that it names exist.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use crate::support::listing::Listing;
use crate::support::policy::generate::{self, Random, Shape};
use crate::support::policy::oracle::{self, Protocol};
use serde_json::{Value, json};

const SHAPE: Shape = Shape::SMALL;
/// Questions about each cluster, in both families.
const ASKED: usize = 500;
const CLUSTERS: u64 = 40;
/// Differences that are shown.
const SHOWN: usize = 3;

/// Returns the answers of a node to the questions of a file.
fn answers(node: &str, more: Option<&str>, objects: &Path, batch: &Path) -> Vec<Value> {
    let output = Command::new(env!("CARGO_BIN_EXE_nftlet"))
        .arg("explain")
        .args(more)
        .args(["--hostname-override", node, "--manifests"])
        .arg(objects)
        .arg("--batch")
        .arg(batch)
        .env_remove("NODE_NAME")
        .output()
        .expect("nftlet runs");
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let lines = text.lines();
    lines
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect()
}

#[test]
fn explanations_agree_with_the_api() {
    let directory = tempfile::tempdir().expect("a directory");
    let (file, batch) = (
        directory.path().join("all.json"),
        directory.path().join("batch"),
    );
    let (mut denied, mut all, mut same, mut named) = (0, 0, 0, 0);
    for seed in 0..CLUSTERS {
        let mut random = Random::new(1_000 + seed);
        let cluster = generate::cluster(&mut random, &SHAPE);
        let objects = generate::manifests(&cluster);
        let list = json!({ "apiVersion": "v1", "kind": "List", "items": objects });
        std::fs::write(&file, list.to_string()).expect("a file");
        let asked: Vec<_> = (0..ASKED)
            .map(|_| generate::connection(&mut random, &SHAPE, &cluster))
            .collect();
        let mut questions = String::new();
        for (source, destination, protocol, port) in &asked {
            let to = match (protocol, destination.is_ipv6()) {
                (Protocol::Icmp, true) => format!("[{destination}]/ICMP"),
                (Protocol::Icmp, false) => format!("{destination}/ICMP"),
                (other, true) => format!("[{destination}]:{port}/{other:?}"),
                (other, false) => format!("{destination}:{port}/{other:?}"),
            };
            let _ = writeln!(questions, "{source} {to}");
        }
        std::fs::write(&batch, questions).expect("a file");
        let asks = |node, more| answers(node, more, &file, &batch);
        let [answers, on_other] = ["node-1", "node-2"].map(|node| asks(node, None));
        assert_eq!(answers.len(), asked.len());
        let path = file.to_str().expect("UTF-8");
        let rules = Listing::compiled(["--hostname-override=node-1", "--manifests", path]);
        named += asks("node-1", Some("--rules"))
            .iter()
            .map(|it| rules.assert_names(it))
            .sum::<usize>();
        let mut different = Vec::new();
        for ((answer, other), asked) in answers.iter().zip(&on_other).zip(&asked) {
            // Where the source is known, the answer does not depend on who answers.
            if answer["node"] == other["node"] {
                same += 1;
                assert_eq!(answer, other, "{asked:?}, seed {seed}");
            }
            let (source, destination, protocol, port) = *asked;
            let wanted = oracle::allowed(&cluster, source, destination, protocol, port);
            all += 1;
            denied += usize::from(!wanted);
            if (answer["verdict"] == "allowed") != wanted {
                different.push(format!("{asked:?} is {wanted}: {answer:#}"));
            }
        }
        if !different.is_empty() {
            let shown = different.iter().take(SHOWN).cloned().collect::<String>();
            let objects = objects
                .iter()
                .map(|it| format!("---\n{it}\n"))
                .collect::<String>();
            panic!(
                "{} differ, seed {seed}: {shown}\n{objects}",
                different.len()
            );
        }
    }
    assert!(
        denied > all / 10 && denied < all,
        "{denied} of {all} denied"
    );
    assert!(same > all / 4, "{same} of {all} asked of both nodes");
    assert!(named > all, "{named} chains and elements");
}
