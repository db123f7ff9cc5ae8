//! Follows changes of the configuration file.
//!
//! Settings are read once, at the start. A valid change therefore ends the process, so that its
//! supervisor restarts it. It could not start with an invalid file: then the settings in force stay.
//!
//! A mounted ConfigMap changes when a symbolic link (`..data`) in its directory is replaced. All
//! directories in which the file, or a link that leads to it, can be replaced are watched, and the
//! file is read again after any notification from them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use notify::event::{AccessKind, AccessMode, ModifyKind};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::{mpsc, watch};

use super::{Error, File};

/// How long events are collected after the first one.
const COLLECT: Duration = Duration::from_millis(10);

/// The most links that are followed from the file; the kernel's own limit.
const MOST_LINKS: usize = 40;

/// Why following ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The file has a new, valid content.
    Changed,
    /// The shutdown was requested.
    Stopped,
}

/// Waits until a file has a valid content other than `known`, or until `shutdown` becomes true or
/// its sender is dropped. Logs each invalid content once.
///
/// # Errors
///
/// [`Error::Follow`] if inotify is not available.
pub(crate) async fn follow(
    path: PathBuf,
    known: File,
    mut shutdown: watch::Receiver<bool>,
) -> Result<Ended, Error> {
    let fault = |source| Error::Follow {
        path: path.clone(),
        source,
    };
    // One signal is enough for all events before it is taken: the file is read afterwards.
    let (signal, mut signals) = mpsc::channel(1);
    let watcher = notify::recommended_watcher(move |event| {
        if matters(&event) {
            // The receiver is dropped at the end of this function.
            let _ = signal.try_send(());
        }
    });
    let mut watched = WatchedDirectories {
        watcher: watcher.map_err(fault)?,
        watched: BTreeSet::new(),
    };
    let mut logged = None;
    loop {
        watched.watch(&path).map_err(fault)?;
        match File::read(&path) {
            Ok(now) if now != known => return Ok(Ended::Changed),
            Ok(_) => logged = None,
            // The file may not exist between its removal and its replacement.
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
            // An error means that the sender was dropped.
            _ = shutdown.wait_for(|stop| *stop) => return Ok(Ended::Stopped),
        }
        tokio::time::sleep(COLLECT).await;
        let _ = signals.try_recv();
    }
}

/// Returns whether a file may have been replaced. A write alone does not count, since the content is
/// incomplete until the file is closed, which is another event.
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

struct WatchedDirectories {
    watcher: RecommendedWatcher,
    watched: BTreeSet<PathBuf>,
}

impl WatchedDirectories {
    /// Watches the directories in which the file can be replaced now, and no others.
    fn watch(&mut self, path: &Path) -> Result<(), notify::Error> {
        let wanted = directories(path);
        for old in self.watched.difference(&wanted) {
            // The watch of a removed directory does not exist any more.
            let _ = self.watcher.unwatch(old);
        }
        self.watched.retain(|known| wanted.contains(known));
        for directory in wanted {
            // A directory that was replaced needs a new watch.
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
        // `..data` is a link in the directory of the file.
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
