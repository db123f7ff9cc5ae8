//! What was promised, and what became of it.
//!
//! `expected.txt` lists the budgets of all benchmarks. Each benchmark ends with [`conclude`], which
//! names those of its own that were missed, with the reason where it is known, and those that it
//! did not measure. `scripts/bench.sh` has it note the same in a file, from which it tells in the
//! end what became of all.

#![allow(dead_code, reason = "each benchmark uses its own part")]

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::Path;

/// Where the outcomes are noted, if anywhere: a line each, whose columns are apart by tabs.
const NOTED_IN: &str = "NFTLET_BENCH_BUDGETS";
/// `benchmark | budget`, and for those that are known to be missed ` | reason`.
const EXPECTED: &str = include_str!("expected.txt");

/// A budget with what was measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// What was promised, in the words of `expected.txt`.
    pub what: String,
    /// The value with its unit.
    pub measured: String,
    /// The most (or least) that it may be.
    pub budget: String,
    /// Whether the budget was kept.
    pub met: bool,
}

/// A line of `expected.txt`.
#[derive(Clone, Copy, Debug)]
struct Expected<'a> {
    what: &'a str,
    reason: Option<&'a str>,
}

/// The budgets of a benchmark.
fn expected(benchmark: &str) -> impl Iterator<Item = Expected<'static>> {
    let lines = EXPECTED.lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(move |line| {
        let (of, rest) = line.split_once(" | ")?;
        let (what, reason) = match rest.split_once(" | ") {
            Some((what, reason)) => (what, Some(reason)),
            None => (rest, None),
        };
        (of == benchmark).then_some(Expected { what, reason })
    })
}

/// Tells which budgets of a benchmark were missed and which were not measured, and notes all of
/// them where that is asked for. Returns whether none was missed.
///
/// # Errors
///
/// When the file cannot be written.
pub fn conclude(benchmark: &str, outcomes: &[Outcome]) -> io::Result<bool> {
    let (mut noted, mut unlisted) = (String::new(), Vec::new());
    for outcome in outcomes {
        let known = expected(benchmark).find(|it| it.what == outcome.what);
        let reason = known.and_then(|it| it.reason).unwrap_or_default();
        let Outcome {
            what,
            measured,
            budget,
            met,
        } = outcome;
        let word = if *met { "met" } else { "missed" };
        noted += &format!("{word}\t{benchmark} | {what}\t{measured}\t{budget}\t{reason}\n");
        if !met {
            let because = if reason.is_empty() { "" } else { ": " };
            eprintln!("missed: {what} is {measured}, budget {budget}{because}{reason}");
        }
        unlisted.extend(known.is_none().then_some(what));
    }
    if let Some(first) = unlisted.first() {
        let count = unlisted.len();
        eprintln!("measured, and not in benches/budgets/expected.txt: {count}, first {first:?}");
    }
    for unmeasured in expected(benchmark) {
        if !outcomes.iter().any(|it| it.what == unmeasured.what) {
            eprintln!("not measured: {}", unmeasured.what);
        }
    }
    if let Some(file) = std::env::var_os(NOTED_IN).filter(|file| !file.is_empty()) {
        note(Path::new(&file), &noted)?;
    }
    Ok(outcomes.iter().all(|outcome| outcome.met))
}

fn note(file: &Path, text: &str) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let opened = options.create(true).append(true).open(file);
    let written = opened.and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("cannot write {}: {error}", file.display()),
        )
    })
}
