//! Golden rulesets: what `--dry-run` prints for the objects of each case.
//!
//! `tests/golden/CASE/*.yaml` are the objects; a file `flags`, where there is one, holds further
//! arguments; `expected.nft` is the text, with the chains of a few numbers of endpoints only. `UPDATE_GOLDEN=1 cargo test --test it golden` writes the
//! expectations anew: read the difference before it is committed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nftlet_lab::netns::{Namespace, require_net_admin};

fn cases() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let entries = fs::read_dir(root).expect("the golden cases");
    let mut cases: Vec<_> = entries
        .map(|entry| entry.expect("a directory entry").path())
        .filter(|path| path.is_dir())
        .collect();
    cases.sort();
    assert!(cases.len() >= 5, "the golden cases are missing");
    cases
}

/// The text for a case, without the first line's version.
fn dry_run(case: &Path) -> String {
    let flags = fs::read_to_string(case.join("flags")).unwrap_or_default();
    let output = Command::new(env!("CARGO_BIN_EXE_nftlet"))
        .args(["--dry-run", "--hostname-override", "node-1", "--manifests"])
        .arg(case)
        .args(flags.split_whitespace())
        .output()
        .expect("nftlet runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{}: {said}", case.display());
    let text = String::from_utf8(output.stdout).expect("text in UTF-8");
    let version = format!("# nftlet {}", env!("CARGO_PKG_VERSION"));
    assert!(text.starts_with(&version), "{text}");
    // What nftlet had to say about the objects belongs to the expectation.
    let root = format!("{}/", case.display());
    let notices = said.lines().map(|line| {
        let line = line.replace(&root, "");
        let start = ["INFO", "WARN", "ERROR"]
            .iter()
            .find_map(|level| line.find(level))
            .unwrap_or_default();
        format!("# stderr: {}\n", &line[start..])
    });
    text.replacen(&version, "# nftlet", 1) + &notices.collect::<String>()
}

/// Leaves out the chains and map elements of most numbers of endpoints, which differ in the number
/// only.
fn brief(text: &str) -> String {
    const KEPT: [&str; 5] = ["1", "2", "64", "65-91", "92-128"];
    let left_out = |name: &str| {
        let number = name.strip_prefix("draw-");
        number.is_some_and(|number| !KEPT.contains(&number))
    };
    let mut lines = Vec::new();
    let mut text = text.lines();
    while let Some(line) = text.next() {
        let chain = line
            .strip_prefix("\tchain ")
            .and_then(|it| it.strip_suffix(" {"));
        if chain.is_some_and(left_out) {
            // The end of the chain, and an empty line.
            text.by_ref().find(|line| *line == "\t}");
            text.next();
            continue;
        }
        let goal = line.split_once(" : jump ").map(|(_, goal)| goal);
        let goal = goal.map(|goal| goal.trim_end_matches([',', ' ', '}']));
        if !goal.is_some_and(left_out) {
            lines.push(line);
        } else if line.ends_with(" }") {
            lines.push("\t\t\t     # and so on }");
        }
    }
    lines.join("\n") + "\n"
}

/// Checks that no set has a concatenated key and ranges: the kernel fills such a set in a time that
/// grows with the square of its elements, and newer kernels refuse what nft 1.0.6 writes for a
/// lookup in one.
#[track_caller]
fn assert_intervals_are_plain(file: &Path, text: &str) {
    let mut key = "";
    for line in text.lines().map(str::trim) {
        if line.starts_with("type ") || line.starts_with("typeof ") {
            key = line;
        } else if line == "flags interval" {
            assert!(!key.contains(" . "), "{}: {key}", file.display());
        }
    }
}

#[test]
fn dry_run_prints_what_is_expected() {
    for case in cases() {
        let file = case.join("expected.nft");
        let whole = dry_run(&case);
        let text = brief(&whole);
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(&file, &text).expect("the expectation is written");
            continue;
        }
        let expected = fs::read_to_string(&file).unwrap_or_default();
        let first = expected
            .lines()
            .zip(text.lines())
            .position(|(a, b)| a != b)
            .unwrap_or_else(|| expected.lines().count().min(text.lines().count()));
        assert!(
            expected == text,
            "{}: line {} is\n  {}\ninstead of\n  {}",
            file.display(),
            first + 1,
            text.lines().nth(first).unwrap_or("(end)"),
            expected.lines().nth(first).unwrap_or("(end)"),
        );
        assert_eq!(whole, dry_run(&case), "the order is not stable");
        assert_intervals_are_plain(&file, &whole);
    }
}

#[test]
fn nft_loads_what_is_expected_twice() {
    if !require_net_admin() {
        return;
    }
    for case in cases() {
        let ns = Namespace::new("golden");
        let text = dry_run(&case);
        ns.nft_load(&text);
        let listing = ns.nft(&["list", "ruleset"]);
        ns.nft_load(&text);
        assert_eq!(listing, ns.nft(&["list", "ruleset"]), "{}", case.display());
    }
}
