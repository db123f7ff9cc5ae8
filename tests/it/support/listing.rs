//! Rulesets as text, to check the names in answers of `nftlet explain --rules`.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// The chains, sets and maps of a ruleset, by table and by kind and name, with their elements.
pub struct Listing(BTreeMap<(String, String), BTreeSet<String>>);

impl Listing {
    /// Compiles the rules of some objects: `arguments` are those of `nftlet`.
    pub fn compiled<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Self {
        let output = Command::new(env!("CARGO_BIN_EXE_nftlet"))
            .arg("--dry-run")
            .args(arguments)
            .env_remove("NODE_NAME")
            .output()
            .expect("nftlet runs");
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        let mut objects = BTreeMap::new();
        let (mut table, mut object) = (String::new(), String::new());
        for line in text.lines() {
            if let Some(name) = line.strip_prefix("table ") {
                table = name.trim_end_matches(" {").to_owned();
            } else if let Some(name) = line.strip_suffix(" {").and_then(|it| it.strip_prefix('\t'))
                && !name.starts_with('\t')
            {
                object = name.to_owned();
                objects.insert((table.clone(), object.clone()), BTreeSet::new());
            }
            let line = line.trim().trim_start_matches("elements = { ");
            let element = line.trim_end_matches(',').trim_end_matches(" }");
            if let Some(of) = objects.get_mut(&(table.clone(), object.clone())) {
                of.insert(element.to_owned());
            }
        }
        assert!(!objects.is_empty(), "{text}");
        Self(objects)
    }

    /// Checks that all chains and elements in an answer are in the ruleset. Returns their number.
    #[track_caller]
    pub fn assert_names(&self, answer: &Value) -> usize {
        let named = named(answer);
        for rule in &named {
            let text = |field: &str| rule[field].as_str().map(str::to_owned);
            let (table, object) = (text("table").unwrap(), text("object").unwrap());
            let found = self.0.get(&(table, object));
            let found = found.unwrap_or_else(|| panic!("there is no {rule}: {answer:#}"));
            if let Some(element) = text("element") {
                assert!(found.contains(&element), "{rule} is not in {found:#?}");
            }
        }
        named.len()
    }
}

/// Returns the chains and elements in an answer.
pub fn named(answer: &Value) -> Vec<&Value> {
    let targets = answer["targets"].as_array().into_iter().flatten();
    let decisions = targets.flat_map(|target| [&target["egress"], &target["ingress"]]);
    let of_policies = decisions.flat_map(|step| step["rules"].as_array().into_iter().flatten());
    let of_service = answer["service"]["rules"].as_array().into_iter().flatten();
    of_service.chain(of_policies).collect()
}
