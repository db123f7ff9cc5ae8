//! Removes kube-proxy's rules: on `--cleanup`, and while nftlet runs.
//!
//! kube-proxy may still run when nftlet's rules are in force, and writes its own again. Once it
//! has ended, they would translate to pods that no longer exist. They are therefore removed again
//! when a port that kube-proxy had becomes free, and every few minutes. A pass that finds nothing
//! costs a few netlink requests.

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;

use super::{Error, print, system};
use crate::cleanup::{self, CleanupReport, CleanupScope};
use crate::settings::Cleanup;

const PASS_EVERY: Duration = Duration::from_secs(600);

/// Removes rules for `--cleanup`, and prints what was removed.
pub(super) fn clean(requested: Cleanup) -> Result<(), Error> {
    let scope = match requested {
        Cleanup::All => CleanupScope::All,
        Cleanup::Nftlet => CleanupScope::Own,
        Cleanup::KubeProxy => CleanupScope::KubeProxy,
        Cleanup::Nothing => return Ok(()),
    };
    let report = cleanup::clean(scope)?;
    let printed = print(|out| write!(out, "{report}"));
    for line in problems(&report) {
        tracing::warn!("{line}");
    }
    if !report.failures().is_empty() {
        return Err(Error::NotCleaned);
    }
    printed
}

/// Starts the thread that removes kube-proxy's rules: when `first_rules` receives a message, for
/// each message on `port_freed`, and every few minutes. It ends with the process.
pub(super) fn start(
    first_rules: oneshot::Receiver<()>,
    port_freed: Receiver<()>,
) -> Result<(), Error> {
    let work = move || {
        // Closed without a message, nftlet's rules were never in force.
        if first_rules.blocking_recv().is_err() {
            return;
        }
        let mut logged = BTreeSet::new();
        loop {
            logged = run_pass(&logged);
            wait_for_next_pass(&port_freed, thread::sleep);
        }
    };
    thread::Builder::new()
        .name("kube-proxy".into())
        .spawn(work)
        .map(drop)
        .map_err(system("the thread that removes kube-proxy's rules"))
}

/// Waits until a port is freed or the next regular pass is due.
fn wait_for_next_pass(port_freed: &Receiver<()>, sleep: impl FnOnce(Duration)) {
    // Without a port of its own, nftlet waits for none that becomes free.
    if let Err(RecvTimeoutError::Disconnected) = port_freed.recv_timeout(PASS_EVERY) {
        sleep(PASS_EVERY);
    }
}

/// Runs one cleanup pass and logs new problems. Returns the problems already logged.
fn run_pass(logged: &BTreeSet<String>) -> BTreeSet<String> {
    let problems: Vec<String> = match cleanup::clean(CleanupScope::Superseded) {
        Ok(report) => {
            for (what, place) in report.removals() {
                tracing::info!("removed what kube-proxy left: {what} ({place})");
            }
            problems(&report).collect()
        }
        Err(error) => vec![format!("{error}; kube-proxy's rules stay")],
    };
    for line in problems.iter().filter(|line| !logged.contains(*line)) {
        tracing::warn!("{line}");
    }
    problems.into_iter().collect()
}

fn problems(report: &CleanupReport) -> impl Iterator<Item = String> {
    let failures = report.failures().iter().map(ToString::to_string);
    report.notes().iter().cloned().chain(failures)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn passes_are_regular_without_ports_and_immediate_when_one_is_freed() {
        let (freed, port_freed) = channel();
        let slept = Cell::new(None);
        freed.send(()).unwrap();
        wait_for_next_pass(&port_freed, |time| slept.set(Some(time)));
        assert_eq!(slept.get(), None);
        // No port is served, so that no sender exists.
        drop(freed);
        wait_for_next_pass(&port_freed, |time| slept.set(Some(time)));
        assert_eq!(slept.get(), Some(PASS_EVERY));
    }
}
