//! Links of the documents, and the steps of the walk-throughs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::{code, documents, is_word, lines, read, root, words};
use crate::layering::LAYERS;

/// The anchors of a document, as GitHub makes them from its headings.
fn anchors(text: &str) -> BTreeSet<String> {
    let mut anchors = BTreeSet::new();
    for line in lines(text).0 {
        let Some(title) = line.strip_prefix('#') else {
            continue;
        };
        let title = title.trim_start_matches('#').trim().to_lowercase();
        let kept = |c: &char| c.is_alphanumeric() || " -_".contains(*c);
        let slug: String = title.chars().filter(kept).collect();
        let slug = slug.replace(' ', "-");
        let mut anchor = slug.clone();
        for number in 1.. {
            if anchors.insert(anchor) {
                break;
            }
            anchor = format!("{slug}-{number}");
        }
    }
    anchors
}

/// The links of a document: their text and their target.
fn links(text: &str) -> Vec<(String, String)> {
    let joined = lines(text).0.join("\n");
    let mut found = Vec::new();
    for (at, _) in joined.match_indices("](") {
        let label = joined[..at]
            .rfind('[')
            .map_or("", |from| &joined[from + 1..at]);
        let target = joined[at + 2..].split(')').next().unwrap_or_default();
        found.push((label.to_owned(), target.trim().to_owned()));
    }
    found
}

/// Whether Rust source defines an item, a variant or a field of this name.
fn defines(source: &str, name: &str) -> bool {
    let kinds = [
        "fn",
        "struct",
        "enum",
        "trait",
        "const",
        "static",
        "type",
        "mod",
        "macro_rules!",
    ];
    source.lines().any(|line| {
        let line = line.trim();
        let line = match line.strip_prefix("pub(") {
            Some(rest) => rest.split_once(") ").map_or("", |(_, rest)| rest),
            None => line.strip_prefix("pub ").unwrap_or(line),
        };
        let rest = line
            .trim_start_matches("async ")
            .trim_start_matches("const fn ");
        let follows = |rest: &str| {
            rest.strip_prefix(name)
                .is_some_and(|after| !after.starts_with(is_word))
        };
        let item = kinds.iter().any(|kind| {
            let after = line.trim_start_matches("async ").strip_prefix(kind);
            after.is_some_and(|after| after.starts_with(' ') && follows(after.trim_start()))
        });
        let part = follows(line) && {
            let after = line[name.len()..].trim_start();
            after.is_empty() || after.starts_with([',', ':', '(', '{', '='])
        };
        item || part || (rest != line && follows(rest))
    })
}

/// The name of the module in a file.
fn module(file: &Path) -> Option<&str> {
    let name = file.file_stem()?.to_str()?;
    let folder = file.parent().and_then(Path::file_name);
    if name == "mod" {
        folder?.to_str()
    } else {
        Some(name)
    }
}

/// What is wrong with a link, if anything.
fn link_fault(
    documents: &BTreeMap<String, String>,
    from: &str,
    label: &str,
    target: &str,
) -> Option<String> {
    if ["https://", "http://", "mailto:"]
        .iter()
        .any(|it| target.starts_with(it))
    {
        return None;
    }
    let (path, anchor) = match target.split_once('#') {
        Some((path, anchor)) => (path, Some(anchor)),
        None => (target, None),
    };
    let folder = Path::new(from).parent().unwrap_or(Path::new(""));
    let mut resolved = if path.is_empty() {
        PathBuf::from(from)
    } else {
        folder.to_owned()
    };
    for part in Path::new(path).components() {
        match part.as_os_str().to_str() {
            Some("..") if !resolved.pop() => return Some(format!("{from}: {target} leads out")),
            Some(".." | ".") => {}
            _ => resolved.push(part),
        }
    }
    if !root().join(&resolved).exists() {
        return Some(format!("{from}: there is no {}", resolved.display()));
    }
    if let Some(anchor) = anchor {
        let document = documents.get(resolved.to_string_lossy().as_ref());
        if !document.is_some_and(|text| anchors(text).contains(anchor)) {
            return Some(format!("{from}: there is no heading {target}"));
        }
    }
    if resolved.extension().is_some_and(|it| it == "rs") {
        let source = read(&resolved);
        for item in code(label).filter(|item| !item.contains(['/', '.'])) {
            let mut segments: Vec<&str> = item.split("::").collect();
            let last = segments.pop().unwrap_or_default();
            let known = |segment: &&str| words(&source).any(|word| word == *segment);
            let exists = module(&resolved) == Some(last) || defines(&source, last);
            if !segments.iter().all(known) || !exists {
                return Some(format!("{from}: {} has no {item}", resolved.display()));
            }
        }
    }
    None
}

#[test]
fn links_lead_to_files_headings_and_items_that_exist() {
    let documents = documents();
    let faults: Vec<String> = documents
        .iter()
        .flat_map(|(path, text)| {
            let faults = links(text).into_iter();
            faults.filter_map(|(label, target)| link_fault(&documents, path, &label, &target))
        })
        .collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn the_table_of_modules_is_that_of_the_layering_test() {
    let text = read("ARCHITECTURE.md");
    let section = text.split("\n## ").find(|it| it.starts_with("Modules\n"));
    let rows = section
        .expect("a section")
        .lines()
        .filter(|line| line.starts_with("| [`"));
    let mut found: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for row in rows {
        let [_, module, _, imports, _] = row.split('|').collect::<Vec<_>>()[..] else {
            panic!("a row has three cells: {row}");
        };
        let module = code(module).next().expect("a module");
        found.insert(module, code(imports).collect());
    }
    // The composition root may import everything.
    let composed = found.remove("app");
    assert_eq!(composed, Some(BTreeSet::new()));
    let layers = LAYERS
        .iter()
        .filter(|(module, _)| !["app", "lib", "main"].contains(module));
    let layers = layers.map(|(module, imports)| (*module, imports.iter().copied().collect()));
    assert_eq!(found, layers.collect());
}

#[test]
fn walk_throughs_link_each_step() {
    let text = read("ARCHITECTURE.md");
    let section = text
        .split("\n## ")
        .find(|it| it.starts_with("Walk-throughs\n"));
    let walks: Vec<&str> = section
        .expect("a section")
        .split("\n### ")
        .skip(1)
        .collect();
    assert_eq!(
        walks.len(),
        5,
        "a field, a metric, an lb chain, a flag, a kind"
    );
    for walk in walks {
        let (title, steps) = walk.split_once('\n').expect("a title");
        let steps: Vec<&str> = steps.split("\n1. ").skip(1).collect();
        assert!(steps.len() >= 4, "{title} has {} steps", steps.len());
        for step in steps {
            let linked = links(step)
                .iter()
                .any(|(label, _)| code(label).next().is_some());
            assert!(
                linked,
                "{title}: a step without a link to a file or an item: {step}"
            );
        }
    }
}

#[test]
fn faults_of_links_are_found() {
    let page = (
        "docs/security.md".to_owned(),
        "## Some `code`, and\n".to_owned(),
    );
    let documents = BTreeMap::from([page]);
    let fault = |label: &str, target: &str| link_fault(&documents, "docs/b.md", label, target);
    for (label, target) in [
        ("a file", "../README.md"),
        ("a heading", "security.md#some-code-and"),
        ("elsewhere", "https://example.com/#x"),
        ("`main`", "../src/main.rs"),
        ("`cleanup`", "../src/cleanup/mod.rs"),
    ] {
        assert_eq!(fault(label, target), None);
    }
    for (label, target) in [
        ("no file", "../nothing.md"),
        ("out", "../../x"),
        ("no heading", "security.md#some-code"),
        ("`no_item`", "../src/main.rs"),
        ("`Nothing::main`", "../src/main.rs"),
    ] {
        assert!(fault(label, target).is_some(), "{label}: {target}");
    }
    assert_eq!(
        links("See [a\nb](x.md) and [`C`](y.rs#z).\n\n```\n[no](link)\n```\n"),
        [("a\nb", "x.md"), ("`C`", "y.rs#z")].map(|(a, b)| (a.to_owned(), b.to_owned()))
    );
    for (source, name, defined) in [
        ("pub(crate) async fn go(", "go", true),
        ("    Service,", "Service", true),
        ("    pub name: String,", "name", true),
        ("pub const fn fixed() {", "fixed", true),
        ("let go = 1;", "go", false),
        ("    gone(x)", "go", false),
        ("// fn go", "go", false),
    ] {
        assert_eq!(defines(source, name), defined, "{source}");
    }
}
