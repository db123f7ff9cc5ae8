//! `--cleanup`, and the removal of another proxy's rules behind the own ones.
//!
//! Another proxy may still run when the own rules stand: it writes its own again, and once it has
//! ended they age into translations to pods that are gone. So they are removed again when a port
//! that it had becomes free, and looked for every few minutes. A look costs a few questions over
//! netlink where nothing is found.

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;

use super::{Error, print, system};
use crate::cleanup::{self, Report, Scope};
use crate::settings::Cleanup;

/// How often rules of another proxy are looked for.
const LOOK_EVERY: Duration = Duration::from_secs(600);

/// Removes what was asked for and prints the list.
pub(super) fn clean(asked: Cleanup) -> Result<(), Error> {
    let scope = match asked {
        Cleanup::All => Scope::All,
        Cleanup::Nftlet => Scope::Own,
        Cleanup::KubeProxy => Scope::KubeProxy,
        Cleanup::Nothing => return Ok(()),
    };
    let report = cleanup::clean(scope)?;
    let printed = print(|out| write!(out, "{report}"));
    tell(&report);
    if !report.failures().is_empty() {
        return Err(Error::NotCleaned);
    }
    printed
}

/// Starts the thread that removes another proxy's rules once the own ones are in force, again
/// whenever the bell rings, and now and then. What it cannot remove it tells in warnings. It ends
/// with whoever rings.
///
/// # Errors
///
/// When the system refuses the thread.
pub(super) fn start(begin: oneshot::Receiver<()>, bell: Receiver<()>) -> Result<(), Error> {
    let remove = move || {
        // The rules were never in force.
        if begin.blocking_recv().is_err() {
            return;
        }
        let mut told = BTreeSet::new();
        loop {
            told = remove(&told);
            if let Err(RecvTimeoutError::Disconnected) = bell.recv_timeout(LOOK_EVERY) {
                return;
            }
        }
    };
    thread::Builder::new()
        .name("leftovers".into())
        .spawn(remove)
        .map(drop)
        .map_err(system("the thread that removes another proxy's rules"))
}

/// Removes what there is. What stays is told unless it was told the last time; returned is what to
/// say nothing of the next time.
fn remove(told: &BTreeSet<String>) -> BTreeSet<String> {
    let lines: Vec<String> = match cleanup::clean(Scope::Superseded) {
        Ok(report) => {
            for (what, place) in report.gone() {
                tracing::info!("removed what kube-proxy left: {what} ({place})");
            }
            lines(&report).collect()
        }
        Err(error) => vec![format!("{error}; the rules that another proxy left stay")],
    };
    for line in lines.iter().filter(|line| !told.contains(*line)) {
        tracing::warn!("{line}");
    }
    lines.into_iter().collect()
}

fn tell(report: &Report) {
    for line in lines(report) {
        tracing::warn!("{line}");
    }
}

fn lines(report: &Report) -> impl Iterator<Item = String> {
    let failures = report.failures().iter().map(ToString::to_string);
    report.notes().iter().cloned().chain(failures)
}
