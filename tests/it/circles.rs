//! Modules of one folder form no circle of imports, so that each can be read after those it uses.
//!
//! Where a folder's own module re-exports an item of a child, the import counts as one of the child.
//! Tests are left out.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::layering::{Token, files, is_path_separator, tokens};

/// The path of a module from the root of the library.
type Module = Vec<String>;

/// The paths in a source that begin at the tokens for which `begins` returns true, without that
/// token; each member of a group is a path.
fn paths<'a>(tokens: &[Token<'a>], begins: impl Fn(usize) -> bool) -> Vec<Vec<&'a str>> {
    let mut found = Vec::new();
    for at in 0..tokens.len() {
        if begins(at) && is_path_separator(tokens, at + 1) {
            path(tokens, at + 3, &mut vec![tokens[at].text], &mut found);
        }
    }
    found
}

/// Adds the paths that continue `before` at a token; returns the token behind them.
fn path<'a>(
    tokens: &[Token<'a>],
    mut at: usize,
    before: &mut Vec<&'a str>,
    found: &mut Vec<Vec<&'a str>>,
) -> usize {
    let length = before.len();
    while let Some(token) = tokens.get(at) {
        if token.text == "{" {
            at += 1;
            while tokens.get(at).is_some_and(|it| it.text != "}") {
                at = path(tokens, at, before, found);
                while tokens
                    .get(at)
                    .is_some_and(|it| !matches!(it.text, "," | "}"))
                {
                    at += 1;
                }
                at += usize::from(tokens.get(at).is_some_and(|it| it.text == ","));
            }
            before.truncate(length);
            return at + 1;
        }
        before.push(token.text);
        if !is_path_separator(tokens, at + 1) {
            break;
        }
        at += 3;
    }
    found.push(before.clone());
    before.truncate(length);
    at + 1
}

/// The source of a file without its tests, as far as they are the end of the file.
fn without_tests(path: &Path) -> String {
    let text = fs::read_to_string(path).expect("the source can be read");
    let end = text.find("#[cfg(test)]\nmod ");
    text[..end.unwrap_or(text.len())].to_owned()
}

fn module_of(path: &Path) -> Module {
    let parts = path.with_extension("");
    let mut parts: Module = parts
        .iter()
        .map(|part| part.to_string_lossy().into_owned())
        .collect();
    parts.retain(|part| part != "mod" && part != "lib");
    parts
}

/// The modules of the library with their sources.
fn modules() -> BTreeMap<Module, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut all: Vec<PathBuf> = Vec::new();
    files(&root, &mut all);
    let is_test = |path: &Path| {
        let mut parts = path.iter();
        parts.any(|part| part == "tests" || part == "tests.rs" || part == "main.rs")
    };
    let paths = all
        .iter()
        .map(|path| path.strip_prefix(&root).expect("below"));
    let paths = paths.filter(|path| !is_test(path));
    paths
        .map(|path| (module_of(path), without_tests(&root.join(path))))
        .collect()
}

/// The items that a module re-exports, by the child that has them.
fn exports(tokens: &[Token], children: &BTreeSet<String>) -> BTreeMap<String, String> {
    let begins =
        |at: usize| at > 0 && tokens[at - 1].text == "use" && children.contains(tokens[at].text);
    let found = paths(tokens, begins).into_iter();
    let found = found.filter_map(|path| Some(((*path.last()?).to_owned(), path[0].to_owned())));
    found.collect()
}

/// Resolves a path in a module to one from the root; `None` for other crates.
fn resolved(module: &Module, path: &[&str]) -> Option<Module> {
    let ups = path.iter().take_while(|part| **part == "super").count();
    let base = match path[0] {
        "crate" => &[][..],
        "super" => &module[..module.len().checked_sub(ups)?],
        _ => return None,
    };
    let rest = path[ups.max(1)..].iter().map(|part| (*part).to_owned());
    Some(base.iter().cloned().chain(rest).collect())
}

/// The imports among the children of a folder: from, to, and the module in which it is.
fn imports(
    modules: &BTreeMap<Module, String>,
    folder: &Module,
    children: &BTreeSet<String>,
) -> BTreeMap<(String, String), Module> {
    let own = tokens(&modules[folder]);
    let exports = exports(&own, children);
    let mut found = BTreeMap::new();
    for (module, source) in modules {
        let Some(from) = module.strip_prefix(&**folder).and_then(<[String]>::first) else {
            continue;
        };
        let tokens = tokens(source);
        let begins = |at: usize| {
            matches!(tokens[at].text, "crate" | "super")
                && (at < 2 || !is_path_separator(&tokens, at - 2))
        };
        for path in paths(&tokens, begins) {
            let to = resolved(module, &path);
            let to = to
                .as_ref()
                .and_then(|to| to.strip_prefix(&**folder)?.first());
            let to = to.and_then(|name| children.get(name).or(exports.get(name)));
            if let Some(to) = to.filter(|to| *to != from) {
                found.insert((from.clone(), to.clone()), module.clone());
            }
        }
    }
    found
}

/// Returns whether one can be reached from another.
fn reaches(imports: &BTreeMap<(String, String), Module>, from: &str, to: &str) -> bool {
    let (mut seen, mut next) = (BTreeSet::new(), vec![from]);
    while let Some(at) = next.pop() {
        for (one, other) in imports.keys().filter(|(one, _)| one == at) {
            if other == to {
                return true;
            }
            if seen.insert((one, other)) {
                next.push(other);
            }
        }
    }
    false
}

#[test]
fn modules_of_a_folder_import_each_other_in_one_direction() {
    let modules = modules();
    let mut circles = Vec::new();
    for folder in modules.keys() {
        let below = modules
            .keys()
            .filter_map(|module| module.strip_prefix(&**folder)?.first());
        let children: BTreeSet<String> = below.cloned().collect();
        let imports = imports(&modules, folder, &children);
        for ((from, to), module) in &imports {
            if reaches(&imports, to, from) {
                circles.push(format!("{}: {from} uses {to}", module.join("::")));
            }
        }
    }
    assert!(circles.is_empty(), "circles:\n{}", circles.join("\n"));
}

#[test]
fn paths_are_found_in_groups() {
    let source = "use super::{a::{B, c::D as E}, f}; fn g() { crate::h::i() }";
    let tokens = tokens(source);
    let found = paths(&tokens, |at| matches!(tokens[at].text, "super" | "crate"));
    let texts: Vec<String> = found.iter().map(|path| path.join("::")).collect();
    assert_eq!(
        texts,
        ["super::a::B", "super::a::c::D", "super::f", "crate::h::i"]
    );
}
