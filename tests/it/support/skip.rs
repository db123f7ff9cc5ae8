//! Tests, or parts of tests, that need what not every machine has.

use std::io::Write as _;

/// Names, apart by spaces, of what may be skipped in CI.
const ALLOWED: &str = "NFTLET_MAY_SKIP";

/// Whether this is a run that skips nothing in silence.
fn in_ci() -> bool {
    std::env::var("CI").is_ok_and(|value| value == "true" || value == "1")
}

/// Says on standard error, past the test runner's capture, that the running test leaves out what
/// needs `what`, and why. Where the environment has `CI=true` it panics, unless `NFTLET_MAY_SKIP`
/// names `what`.
#[track_caller]
pub fn skip(what: &str, why: &str) {
    let name = std::thread::current().name().unwrap_or("a test").to_owned();
    let allowed = std::env::var(ALLOWED).unwrap_or_default();
    assert!(
        !in_ci() || allowed.split_whitespace().any(|word| word == what),
        "{name} needs {what}, and CI skips only what {ALLOWED} names: {why}"
    );
    // Written to the descriptor itself: the print macros are captured for tests that pass.
    let _ = writeln!(std::io::stderr(), "\nSKIPPED in {name}: {what}: {why}");
}
