//! Follows changes of the configuration file.
//!
//! Settings are read once, at the start. A change that can be used therefore ends the process, so
//! that its supervisor starts it again. With a file that cannot be used it would not start, so the
//! settings in force stay.
//!
//! A mounted ConfigMap changes by a symbolic link (`..data`) that is replaced in its directory.
//! The watched directories are therefore those in which the file or a link that leads to it can be
//! replaced, and the file is read again after any notification from them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use notify::event::{AccessKind, AccessMode, ModifyKind};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::{mpsc, watch};

use super::{Error, File};

/// How long further events are collected once one has arrived.
const COLLECT: Duration = Duration::from_millis(10);

/// The most links that are followed from the file; the kernel's own limit.
const MOST_LINKS: usize = 40;

/// Why following ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The file has another content that can be used.
    Changed,
    /// The shutdown was requested.
    Stopped,
}

/// Waits until a file has another content than `known` that can be used, or until `shutdown` turns
/// true or its sender is dropped. A content that cannot be used is one line in the log.
///
/// # Errors
///
/// [`Error::Follow`] when inotify is not available.
pub(crate) async fn follow(
    path: PathBuf,
    known: File,
    mut shutdown: watch::Receiver<bool>,
) -> Result<Ended, Error> {
    let fault = |source| Error::Follow {
        path: path.clone(),
        source,
    };
    // One signal stands for all that come before it is taken: the file is read afterwards.
    let (signal, mut signals) = mpsc::channel(1);
    let watcher = notify::recommended_watcher(move |event| {
        if matters(&event) {
            // The receiver is dropped at the end of this function.
            let _ = signal.try_send(());
        }
    });
    let mut places = Places {
        watcher: watcher.map_err(fault)?,
        watched: BTreeSet::new(),
    };
    let mut logged = None;
    loop {
        places.watch(&path).map_err(fault)?;
        match File::read(&path) {
            Ok(now) if now != known => return Ok(Ended::Changed),
            Ok(_) => logged = None,
            // Between the old file and the new one there may be none.
            Err(Error::Read { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                let line = error.to_string();
                if logged.as_ref() != Some(&line) {
                    tracing::error!("{line}; the settings in force stay");
                }
                logged = Some(line);
            }
        }
        tokio::select! {
            _ = signals.recv() => {}
            // An error says that the sender was dropped, so that nothing can ask any more.
            _ = shutdown.wait_for(|stop| *stop) => return Ok(Ended::Stopped),
        }
        tokio::time::sleep(COLLECT).await;
        let _ = signals.try_recv();
    }
}

/// Returns whether a file may have been replaced. While it is being written it is not whole; its
/// closing is another event.
fn matters(event: &notify::Result<notify::Event>) -> bool {
    let Ok(event) = event else {
        return true;
    };
    match event.kind {
        EventKind::Access(kind) => kind == AccessKind::Close(AccessMode::Write),
        EventKind::Modify(ModifyKind::Data(_)) => false,
        _ => true,
    }
}

/// The watched directories.
struct Places {
    watcher: RecommendedWatcher,
    watched: BTreeSet<PathBuf>,
}

impl Places {
    /// Watches the directories in which the file can be replaced now, and no others.
    fn watch(&mut self, path: &Path) -> Result<(), notify::Error> {
        let wanted = directories(path);
        for gone in self.watched.difference(&wanted) {
            // A directory that was removed has no watch any more.
            let _ = self.watcher.unwatch(gone);
        }
        self.watched.retain(|known| wanted.contains(known));
        for directory in wanted {
            // One that was replaced needs a new watch, so that the old one does not count.
            if directory.is_dir() {
                self.watcher
                    .watch(&directory, RecursiveMode::NonRecursive)?;
                self.watched.insert(directory);
            }
        }
        Ok(())
    }
}

/// Returns the directories of the file and of all links that lead to it.
fn directories(path: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut at = path.to_owned();
    for _ in 0..MOST_LINKS {
        let directory = parent(&at);
        found.insert(directory.clone());
        if let Ok(real) = directory.canonicalize() {
            found.insert(real);
        }
        // `..data` is a link inside of the directory that the file appears to be in.
        if directory.is_symlink() {
            found.insert(parent(&directory));
        }
        match at.read_link() {
            Ok(target) => at = directory.join(target),
            Err(_) => break,
        }
    }
    found
}

fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => PathBuf::from("."),
        Some(parent) => parent.to_owned(),
        None => path.to_owned(),
    }
}

#[cfg(test)]
mod tests;
