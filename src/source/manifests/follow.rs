//! Following changes of files through inotify.
//!
//! On any notification the directories are walked again, and changed files are read. A file that is
//! written in place is read when its writer closes it, and one that was renamed is read at once: then
//! its content is complete. Any other change (a removed file, a directory moved in, a symbolic link
//! with a new target) must be found by two walks in a row before it is applied, so that an editor
//! that moves a file away and writes a new one does not delete its objects in between.

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

/// How long notifications are collected after the first one, since a rename sends two.
const COLLECT: Duration = Duration::from_millis(2);
/// The time between two walks that must find the same change.
const SETTLE: Duration = Duration::from_millis(10);
/// The maximum number of changed paths; with more, all files are checked.
const MOST_PATHS: usize = 4096;

impl Manifests {
    /// Sends changes of the files, including those since [`load`](Manifests::load), until `shutdown`
    /// becomes true or its sender is dropped, or the receiver of `sender` is dropped.
    ///
    /// # Errors
    /// [`Error::Watch`] if inotify is not available. A directory that cannot be watched is reported
    /// in a notice.
    pub async fn follow(
        self,
        sender: Sender,
        mut shutdown: watch::Receiver<bool>,
    ) -> Result<(), Error> {
        let (inlet, mut arrived) = watch::channel(FileChanges::default());
        let inlet = Arc::new(inlet);
        let add = inlet.clone();
        let watcher = notify::recommended_watcher(move |event| {
            add.send_if_modified(|changes| changes.add(event));
        });
        let mut follower = Follower {
            paths: self
                .paths
                .into_iter()
                .filter(|path| !is_standard_input(path))
                .collect(),
            // Unknown if it was removed: then a path relative to it leads nowhere.
            working_directory: std::env::current_dir().unwrap_or_default(),
            state: self.state,
            watcher: watcher.map_err(|source| Error::Watch { source })?,
            watched: HashMap::new(),
            tree: Tree::default(),
            unsettled: HashMap::new(),
            lost: false,
        };
        // Files may have changed since they were loaded.
        let mut changes = FileChanges {
            lost: true,
            ..FileChanges::default()
        };
        let mut at = Instant::now();
        loop {
            // Reading and parsing would block the runtime.
            let work = tokio::task::spawn_blocking(move || {
                let events = follower.check(&changes);
                (follower, events)
            });
            let events;
            (follower, events) = tokio::select! {
                done = work => match done {
                    Ok(done) => done,
                    // The runtime is shutting down.
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
                    // The wait cannot fail, since the follower has the watcher, which has the sender.
                    let _ = arrived.changed().await;
                    at = Instant::now();
                    sleep(COLLECT).await;
                }
            };
            tokio::select! {
                () = wait => {}
                () = stopped(&mut shutdown) => return Ok(()),
            }
            changes = FileChanges::default();
            inlet.send_if_modified(|waiting| {
                changes = mem::take(waiting);
                false
            });
        }
    }
}

/// Waits for the shutdown.
async fn stopped(shutdown: &mut watch::Receiver<bool>) {
    // The wait fails if the sender was dropped, which is a shutdown too.
    let _ = shutdown.wait_for(|stop| *stop).await;
}

/// The notifications of inotify since the last walk.
#[derive(Debug, Default)]
struct FileChanges {
    /// The changed paths, with whether the content of the file is complete.
    paths: BTreeMap<PathBuf, bool>,
    /// Whether notifications were lost, so that any file may have changed.
    lost: bool,
}

impl FileChanges {
    /// Adds a notification. Returns whether it calls for a walk.
    fn add(&mut self, event: notify::Result<notify::Event>) -> bool {
        let event = match event {
            Ok(event) => event,
            Err(fault) => {
                tracing::warn!(%fault, "inotify failed; checking all manifests again");
                self.lost = true;
                return true;
            }
        };
        let whole = match event.kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write))
            | EventKind::Modify(ModifyKind::Name(RenameMode::To)) => true,
            // A new file is read once its writer closes it; a link is complete as soon as it exists.
            EventKind::Create(CreateKind::File) if !event.paths.iter().any(|it| is_link(it)) => {
                return false;
            }
            // A change of mode may make a file readable.
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
        // Bounds the memory if files change faster than they are walked.
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
    working_directory: PathBuf,
    state: ManifestStore,
    watcher: RecommendedWatcher,
    /// The identity of each watched directory: one that was removed and created again needs a new
    /// watch.
    watched: HashMap<PathBuf, FileId>,
    tree: Tree,
    /// The changes of the last walk that the next one must confirm.
    unsettled: HashMap<PathBuf, Option<Stamp>>,
    /// Whether notifications were lost since all changes were confirmed.
    lost: bool,
}

impl Follower {
    /// Returns whether a change of a path may concern the manifests. Notifications have absolute
    /// paths, also for manifests that were given by relative ones.
    fn concerns(&self, path: &Path) -> bool {
        let relative = path.strip_prefix(&self.working_directory).ok();
        self.is_manifest(path) || relative.is_some_and(|path| self.is_manifest(path))
    }

    fn is_manifest(&self, path: &Path) -> bool {
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        // The kubelet replaces the link `..data` when a mounted ConfigMap changes.
        name.starts_with(b"..")
            || self.tree.exact.contains(path)
            || self.tree.directories.contains(path)
            || (self.tree.directories.contains(&plain(parent(path))) && !is_hidden(path))
    }

    /// Walks the directories and reads changed files. Returns the resulting events. Must be called
    /// again while `unsettled` is not empty.
    fn check(&mut self, changes: &FileChanges) -> Vec<Event> {
        self.lost |= changes.lost;
        let concerned = changes.paths.keys().any(|path| self.concerns(path));
        if !concerned && !self.lost && self.unsettled.is_empty() {
            return Vec::new();
        }
        // By identity, since one file may have several paths.
        let whole: HashSet<FileId> = changes
            .paths
            .iter()
            .filter_map(|(path, whole)| whole.then(|| identity(path))?)
            .collect();
        let mut events: Vec<Event> = self.walk().into_iter().map(Event::Notice).collect();
        let before = mem::take(&mut self.unsettled);
        let mut unsettled = HashMap::new();
        // Returns whether the last walk found the same, and records what this one found.
        let mut confirm = |path: &Path, found| {
            let confirmed = before.get(path) == Some(&found);
            if !confirmed {
                unsettled.insert(path.to_owned(), found);
            }
            confirmed
        };
        let mut versions = Vec::new();
        for (path, stamp) in &self.tree.files {
            let finished = whole.contains(&stamp.identity());
            let changed = match self.state.stamp(path) {
                Some(known) if known.identity() == stamp.identity() => self.lost && known != *stamp,
                Some(_) => true,
                // Could not be read before, or is being created.
                None => !stamp.is_empty(),
            };
            let ready = finished || (changed && confirm(path, Some(*stamp)));
            if !ready {
                continue;
            }
            let version = match files::read(path) {
                Ok((bytes, stamp)) => FileVersion::Read {
                    bytes,
                    stamp: Some(stamp),
                    finished,
                },
                // Removed meanwhile; the next walk does not find it.
                Err(fault) if fault.kind() == std::io::ErrorKind::NotFound => continue,
                Err(fault) => FileVersion::Unreadable(fault),
            };
            versions.push((path.clone(), version));
        }
        for path in self.state.files() {
            let found = self.tree.files.contains_key(path) || is_standard_input(path);
            if !found && confirm(path, None) {
                versions.push((path.to_owned(), FileVersion::Removed));
            }
        }
        self.lost &= !unsettled.is_empty();
        self.unsettled = unsettled;
        events.extend(self.state.update(versions));
        events
    }

    /// Walks the directories and watches new ones.
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
                // The kernel removed the watch with the directory.
                let _ = watcher.unwatch(&directory);
            }
            match watcher.watch(&directory, RecursiveMode::NonRecursive) {
                Ok(()) => {
                    watched.insert(directory, identity);
                }
                Err(fault) => {
                    let message = format!(
                        "changes in this directory cannot be followed: {fault}; raise the sysctl fs.inotify.max_user_watches"
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
    fn too_many_changed_paths_count_as_lost_notifications() {
        let mut changes = FileChanges::default();
        let closed = EventKind::Access(AccessKind::Close(AccessMode::Write));
        let mut add = |name: usize| {
            let event = notify::Event::new(closed).add_path(PathBuf::from(name.to_string()));
            assert!(changes.add(Ok(event)));
            (changes.paths.len(), changes.lost)
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
        let mut changes = FileChanges::default();
        assert!(!changes.add(Ok(notify::Event::new(EventKind::Any))));
        assert!(!changes.lost);
        let rescan = notify::Event::new(EventKind::Other).set_flag(Flag::Rescan);
        assert!(changes.add(Ok(rescan)) && changes.lost);
    }
}
