//! The machine that measures: whether it can, what it is, and the files that are left on it.

#![allow(dead_code, reason = "each benchmark uses its own part")]

use std::path::Path;
use std::{fs, io, thread};

use nix::sched::{CloneFlags, unshare};

/// Why this process cannot measure in network namespaces.
pub fn refusal() -> Option<String> {
    // A thread of its own tries it, so that this one stays where it is.
    let attempt = thread::spawn(|| unshare(CloneFlags::CLONE_NEWNET)).join();
    match attempt {
        Ok(Err(error)) => Some(format!("creating a network namespace fails: {error}")),
        _ => None,
    }
}

/// Why this process cannot load kube-proxy's shape of many services with `nft` either.
pub fn refusal_of_large_rulesets() -> Option<String> {
    refusal().or_else(|| {
        // The map of the first user namespace covers every number.
        let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
        let first = map.split_whitespace().eq(["0", "0", "4294967295"]);
        (!first).then(|| {
            "inside a user namespace nft cannot send transactions as large as the compared ones"
                .to_owned()
        })
    })
}

/// The kernel's release and the number of processors.
pub fn kernel_and_processors() -> io::Result<(String, usize)> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let processors = thread::available_parallelism()?.get();
    Ok((release.trim().to_owned(), processors))
}

/// Writes a file of results.
pub fn write(file: &Path, text: &str) -> io::Result<()> {
    fs::write(file, text).map_err(|error| named("write", file, error))
}

/// An error with the operation and the file that it is about.
pub fn named(operation: &str, file: &Path, error: io::Error) -> io::Error {
    let message = format!("cannot {operation} {}: {error}", file.display());
    io::Error::new(error.kind(), message)
}
