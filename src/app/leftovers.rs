//! `--cleanup`, and the removal of another proxy's rules behind the first own ones.

use std::io::{self, Write};
use std::thread;

use tokio::sync::oneshot;

use super::{Error, system};
use crate::cleanup::{self, Report, Scope};
use crate::cli::Cleanup;

/// Removes what was asked for and prints the list.
pub(super) fn clean(asked: Cleanup) -> Result<(), Error> {
    let scope = match asked {
        Cleanup::All => Scope::All,
        Cleanup::Nftlet => Scope::Own,
        Cleanup::KubeProxy => Scope::KubeProxy,
        Cleanup::Nothing => return Ok(()),
    };
    let report = cleanup::clean(scope)?;
    let printed = write!(io::stdout(), "{report}");
    tell(&report);
    if !report.failures().is_empty() {
        return Err(Error::NotCleaned);
    }
    printed.map_err(Error::PrintRemoved)
}

/// Starts the thread that removes another proxy's rules once the own ones are in force. What it
/// cannot remove it tells in warnings. It ends with the process.
///
/// # Errors
///
/// When the system refuses the thread.
pub(super) fn start(begin: oneshot::Receiver<()>) -> Result<(), Error> {
    let remove = move || {
        // The rules were never in force.
        if begin.blocking_recv().is_err() {
            return;
        }
        match cleanup::clean(Scope::Superseded) {
            Ok(report) => {
                for (what, place) in report.gone() {
                    tracing::info!("removed what kube-proxy left: {what} ({place})");
                }
                tell(&report);
            }
            Err(error) => tracing::warn!("{error}; the rules that another proxy left stay"),
        }
    };
    thread::Builder::new()
        .name("leftovers".into())
        .spawn(remove)
        .map(drop)
        .map_err(system("the thread that removes another proxy's rules"))
}

fn tell(report: &Report) {
    for note in report.notes() {
        tracing::warn!("{note}");
    }
    for failure in report.failures() {
        tracing::warn!("{failure}");
    }
}
