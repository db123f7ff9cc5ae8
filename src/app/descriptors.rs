//! The limit of open files.

use std::io;
use std::os::fd::AsFd;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::Error;

/// The files that an idle nftlet has open, and some more for connections and health checks.
const NEEDED: usize = 64;

/// Raises the limit as far as the process may, and returns it.
///
/// Fails if nftlet cannot work with it: a runtime without descriptors would panic.
pub(super) fn reserve() -> Result<usize, Error> {
    let limit = raise();
    let stderr = io::stderr();
    let opened: io::Result<Vec<_>> = (0..NEEDED)
        .map(|_| stderr.as_fd().try_clone_to_owned())
        .collect();
    opened.map(|_| limit).map_err(|source| Error::Descriptors {
        needed: NEEDED,
        source,
    })
}

fn raise() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    let current = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(error) => {
            tracing::warn!(
                "cannot raise the limit of open files (nofile) to {:?}: {error}",
                limit.maximum
            );
            limit.current
        }
    };
    // `None` is unlimited.
    current.map_or(usize::MAX, |limit| {
        usize::try_from(limit).unwrap_or(usize::MAX)
    })
}
