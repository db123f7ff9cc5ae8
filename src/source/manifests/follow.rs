//! Noticing changes of files.
//!
//! On any notification the directories are walked again, and the files are read that are not what
//! they were. A file that is written in place is read when its writer closes it, and one that takes
//! the place of another by a rename at once: at those moments its content is whole. Anything else
//! that a walk finds changed (a vanished file, a directory moved in, a symbolic link that leads
//! elsewhere) must look the same twice, a moment apart, before it counts; so an editor that moves
//! a file away and writes a new one does not make its objects vanish in between.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::mem;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use notify::event::{AccessKind, AccessMode, CreateKind, ModifyKind, RenameMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::watch;
use tokio::time::sleep;

use super::files::{self, FileId, Stamp, Tree, identity, is_hidden, parent, plain};
use super::notice::file_notice;
use super::store::{FileVersion, ManifestStore};
use super::{Error, Manifests, is_standard_input};
use crate::model::{Delivery, Event, Notice, Reason};
use crate::source::Sender;

/// How long further notifications are collected once one has arrived: a rename is two of them.
const COLLECT: Duration = Duration::from_millis(2);
/// How long what a walk finds must stay the same before it counts.
const SETTLE: Duration = Duration::from_millis(10);
/// The most paths that are kept until the next walk.
const MOST_PATHS: usize = 4096;

impl Manifests {
    /// Sends every change of the files until `shutdown` turns true (or its sender is gone), or
    /// the receiver of `sender` is gone. Changes since [`load`](Manifests::load) are included.
    ///
    /// # Errors
    /// [`Error::Watch`] when inotify is not available. A single directory that cannot be watched
    /// is a notice.
    pub async fn follow(
        self,
        sender: Sender,
        mut shutdown: watch::Receiver<bool>,
    ) -> Result<(), Error> {
        let (inlet, mut arrived) = watch::channel(FileChanges::default());
        let inlet = Arc::new(inlet);
        let add = inlet.clone();
        let watcher = notify::recommended_watcher(move |event| {
            add.send_if_modified(|news| news.add(event));
        });
        let mut follower = Follower {
            paths: self
                .paths
                .into_iter()
                .filter(|path| !is_standard_input(path))
                .collect(),
            state: self.state,
            watcher: watcher.map_err(|source| Error::Watch { source })?,
            watched: HashMap::new(),
            tree: Tree::default(),
            unsettled: HashMap::new(),
            lost: false,
        };
        // What happened since the files were loaded.
        let mut news = FileChanges {
            lost: true,
            ..FileChanges::default()
        };
        let mut at = Instant::now();
        loop {
            // Reading and parsing may take a while; it must not hold up the reconciler.
            let work = tokio::task::spawn_blocking(move || {
                let events = follower.look(&news);
                (follower, events)
            });
            let events;
            (follower, events) = tokio::select! {
                done = work => match done {
                    Ok(done) => done,
                    // Only when the runtime shuts down.
                    Err(_) => return Ok(()),
                },
                () = stopped(&mut shutdown) => return Ok(()),
            };
            for event in events {
                let delivered = tokio::select! {
                    sent = sender.send(Delivery { at, event }) => sent.is_ok(),
                    () = stopped(&mut shutdown) => false,
                };
                if !delivered {
                    return Ok(());
                }
            }
            let settles = !follower.unsettled.is_empty();
            let wait = async {
                if settles {
                    sleep(SETTLE).await;
                } else {
                    // The watcher, which sends, is there as long as this.
                    let _ = arrived.changed().await;
                    at = Instant::now();
                    sleep(COLLECT).await;
                }
            };
            tokio::select! {
                () = wait => {}
                () = stopped(&mut shutdown) => return Ok(()),
            }
            news = FileChanges::default();
            inlet.send_if_modified(|waiting| {
                news = mem::take(waiting);
                false
            });
        }
    }
}

/// Waits until the shutdown is asked for.
async fn stopped(shutdown: &mut watch::Receiver<bool>) {
    // An error says that the sender is gone, so that nothing else can ask.
    let _ = shutdown.wait_for(|stop| *stop).await;
}

/// What inotify has reported since the last walk.
#[derive(Debug, Default)]
struct FileChanges {
    /// The paths, with whether the content of the file is whole.
    paths: BTreeMap<PathBuf, bool>,
    /// Whether reports were lost, so that any file may have changed.
    lost: bool,
}

impl FileChanges {
    /// Adds a report. Returns whether there is something to look at.
    fn add(&mut self, event: notify::Result<notify::Event>) -> bool {
        let event = match event {
            Ok(event) => event,
            Err(fault) => {
                tracing::warn!(%fault, "inotify reports a fault; looking at all manifests again");
                self.lost = true;
                return true;
            }
        };
        let whole = match event.kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write))
            | EventKind::Modify(ModifyKind::Name(RenameMode::To)) => true,
            // A file that is being written is read once it is closed; a link is whole as soon as
            // it exists.
            EventKind::Create(CreateKind::File) if !event.paths.iter().any(|it| is_link(it)) => {
                return false;
            }
            // A change of mode may let nftlet read what it could not.
            EventKind::Create(_)
            | EventKind::Remove(_)
            | EventKind::Modify(ModifyKind::Name(_) | ModifyKind::Metadata(_)) => false,
            _ if event.need_rescan() => {
                self.lost = true;
                return true;
            }
            _ => return false,
        };
        for path in event.paths {
            *self.paths.entry(plain(&path)).or_default() |= whole;
        }
        // A writer may be faster than the walks.
        if self.paths.len() > MOST_PATHS {
            self.paths.clear();
            self.lost = true;
        }
        true
    }
}

fn is_link(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_symlink() || metadata.nlink() > 1)
}

struct Follower {
    paths: Vec<PathBuf>,
    state: ManifestStore,
    watcher: RecommendedWatcher,
    /// Watched directories, with what they were when the watch was set: a directory that was
    /// removed and made again needs a new watch.
    watched: HashMap<PathBuf, FileId>,
    tree: Tree,
    /// What the last walk found changed without a sign that it is whole.
    unsettled: HashMap<PathBuf, Option<Stamp>>,
    /// Whether files may have been closed unnoticed since all was settled.
    lost: bool,
}

impl Follower {
    /// Whether something at a path can matter.
    fn concerns(&self, path: &Path) -> bool {
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        // Kubernetes swaps the link `..data` when a mounted ConfigMap changes.
        name.starts_with(b"..")
            || self.tree.exact.contains(path)
            || self.tree.directories.contains(path)
            || (self.tree.directories.contains(&plain(parent(path))) && !is_hidden(path))
    }

    /// Looks at all files and reads those that changed; returns what changes by that. It is to be
    /// called again where something is unsettled.
    fn look(&mut self, news: &FileChanges) -> Vec<Event> {
        self.lost |= news.lost;
        let concerned = news.paths.keys().any(|path| self.concerns(path));
        if !concerned && !self.lost && self.unsettled.is_empty() {
            return Vec::new();
        }
        // By identity, since a file may be reached through links.
        let whole: HashSet<FileId> = news
            .paths
            .iter()
            .filter_map(|(path, whole)| whole.then(|| identity(path))?)
            .collect();
        let mut events: Vec<Event> = self.walk().into_iter().map(Event::Notice).collect();
        let before = mem::take(&mut self.unsettled);
        let mut unsettled = HashMap::new();
        let mut settled = |path: &Path, found| {
            let settled = before.get(path) == Some(&found);
            if !settled {
                unsettled.insert(path.to_owned(), found);
            }
            settled
        };
        let mut versions = Vec::new();
        for (path, stamp) in &self.tree.files {
            let finished = whole.contains(&stamp.identity());
            let changed = match self.state.stamp(path) {
                Some(known) if known.identity() == stamp.identity() => self.lost && known != *stamp,
                Some(_) => true,
                // Could not be read, or is being made.
                None => !stamp.is_empty(),
            };
            let ready = finished || (changed && settled(path, Some(*stamp)));
            if !ready {
                continue;
            }
            let version = match files::read(path) {
                Ok((bytes, stamp)) => FileVersion::Read {
                    bytes,
                    stamp: Some(stamp),
                    finished,
                },
                // It went away in between; the next walk does not find it.
                Err(fault) if fault.kind() == std::io::ErrorKind::NotFound => continue,
                Err(fault) => FileVersion::Unreadable(fault),
            };
            versions.push((path.clone(), version));
        }
        for path in self.state.files() {
            let found = self.tree.files.contains_key(path) || is_standard_input(path);
            if !found && settled(path, None) {
                versions.push((path.to_owned(), FileVersion::Gone));
            }
        }
        self.lost &= !unsettled.is_empty();
        self.unsettled = unsettled;
        events.extend(self.state.update(versions));
        events
    }

    /// Walks the files again, watching directories that are new.
    fn walk(&mut self) -> Vec<Notice> {
        let (watcher, watched) = (&mut self.watcher, &mut self.watched);
        let mut notices = Vec::new();
        self.tree = Tree::walk(&self.paths, &mut |directory| {
            let directory = plain(directory);
            let Some(identity) = identity(&directory) else {
                return;
            };
            if watched.get(&directory) == Some(&identity) {
                return;
            }
            if watched.contains_key(&directory) {
                // The kernel forgot the watch along with the directory.
                let _ = watcher.unwatch(&directory);
            }
            match watcher.watch(&directory, RecursiveMode::NonRecursive) {
                Ok(()) => {
                    watched.insert(directory, identity);
                }
                Err(fault) => {
                    let message = format!(
                        "changes here will go unnoticed: {fault}; raise the sysctl fs.inotify.max_user_watches"
                    );
                    notices.push(file_notice(&directory, None, Reason::InvalidFile, message));
                }
            }
        });
        watched.retain(|directory, _| {
            let keep = directory.is_dir();
            if !keep {
                let _ = watcher.unwatch(directory);
            }
            keep
        });
        notices
    }
}

#[cfg(test)]
mod tests {
    use notify::event::Flag;

    use super::*;

    #[test]
    fn of_more_than_may_wait_everything_is_looked_at_again() {
        let mut news = FileChanges::default();
        let closed = EventKind::Access(AccessKind::Close(AccessMode::Write));
        let mut add = |name: usize| {
            let event = notify::Event::new(closed).add_path(PathBuf::from(name.to_string()));
            assert!(news.add(Ok(event)));
            (news.paths.len(), news.lost)
        };
        assert_eq!(
            (0..MOST_PATHS).map(&mut add).last(),
            Some((MOST_PATHS, false))
        );
        assert_eq!(add(0), (MOST_PATHS, false));
        assert_eq!(add(MOST_PATHS), (0, true));
    }

    #[test]
    fn a_loss_that_inotify_reports_counts() {
        let mut news = FileChanges::default();
        assert!(!news.add(Ok(notify::Event::new(EventKind::Any))));
        assert!(!news.lost);
        let rescan = notify::Event::new(EventKind::Other).set_flag(Flag::Rescan);
        assert!(news.add(Ok(rescan)) && news.lost);
    }
}
