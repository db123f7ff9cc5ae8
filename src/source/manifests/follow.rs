//! Noticing changes of files.
//!
//! A file is read again when its writer closes it or when another file takes its place: at those
//! moments its content is whole. What a walk over the directories finds changed without such a
//! sign (a new or vanished file, a directory moved in, a symbolic link that leads elsewhere) must
//! look the same twice, a moment apart, before it counts; so an editor that moves a file away and
//! writes a new one does not make its objects vanish in between.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use notify::event::{AccessKind, AccessMode, CreateKind, ModifyKind, RenameMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::watch;

use super::files::{self, Stamp, Tree, is_hidden, parent, plain};
use super::state::{State, Version, file_notice};
use super::{Error, Manifests, is_standard_input, news};
use crate::model::{Delivery, Event, Notice, Reason};
use crate::source::Sender;

/// How long further events are collected once one has arrived: a rename is two of them.
const COLLECT: Duration = Duration::from_millis(2);
/// How long what a walk finds must stay the same before it counts.
const SETTLE: Duration = Duration::from_millis(10);

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
        let (inlet, mut news) = news::queue();
        let watcher = notify::recommended_watcher(move |event| inlet.add(event))
            .map_err(|source| Error::Watch { source })?;
        let holds_back = self.holds_back();
        let mut follower = Follower {
            holds_back,
            paths: self
                .paths
                .into_iter()
                .filter(|path| !is_standard_input(path))
                .collect(),
            state: self.state,
            watcher,
            watched: HashMap::new(),
            tree: Tree::default(),
            unsettled: HashMap::new(),
        };
        let mut batch = Batch {
            walk: true,
            thorough: true,
            ..Batch::default()
        };
        let mut at = Instant::now();
        loop {
            // Reading and parsing may take a while; it must not hold up the reconciler.
            let work = tokio::task::spawn_blocking(move || {
                let (events, unsettled) = follower.process(&batch);
                (follower, events, unsettled)
            });
            let (events, unsettled);
            (follower, events, unsettled) = tokio::select! {
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
            batch = Batch::default();
            let settle = async {
                if unsettled {
                    tokio::time::sleep(SETTLE).await;
                } else {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                Some(event) = news.next() => {
                    at = Instant::now();
                    batch.add(event, &follower);
                    tokio::time::sleep(COLLECT).await;
                }
                () = settle => {}
                () = stopped(&mut shutdown) => return Ok(()),
            }
            batch.walk |= unsettled;
            for event in news.rest() {
                batch.add(event, &follower);
            }
        }
    }
}

/// Waits until the shutdown is asked for.
async fn stopped(shutdown: &mut watch::Receiver<bool>) {
    // An error says that the sender is gone, and with it whoever could ask.
    let _ = shutdown.wait_for(|stop| *stop).await;
}

/// What the events of a moment ask for.
#[derive(Default)]
struct Batch {
    /// Files whose content is new and whole.
    touched: BTreeSet<PathBuf>,
    /// Whether to look for files that came, went or were replaced.
    walk: bool,
    /// Whether events were lost, so that any file may have changed.
    thorough: bool,
}

impl Batch {
    fn add(&mut self, event: notify::Result<notify::Event>, follower: &Follower) {
        let event = match event {
            Ok(event) => event,
            Err(fault) => {
                tracing::warn!(%fault, "inotify reports a fault; looking at all manifests again");
                (self.walk, self.thorough) = (true, true);
                return;
            }
        };
        if event.need_rescan() {
            (self.walk, self.thorough) = (true, true);
            return;
        }
        for path in event.paths {
            let path = plain(&path);
            if !follower.concerns(&path) {
                continue;
            }
            match event.kind {
                EventKind::Access(AccessKind::Close(AccessMode::Write)) => {
                    self.touched.insert(path);
                }
                EventKind::Modify(ModifyKind::Name(RenameMode::To)) => {
                    self.walk = true;
                    self.touched.insert(path);
                }
                // A file that is being written is read once it is closed; a link is whole as
                // soon as it exists.
                EventKind::Create(CreateKind::File) => self.walk |= is_link(&path),
                EventKind::Create(_)
                | EventKind::Remove(_)
                | EventKind::Modify(ModifyKind::Name(_)) => {
                    self.walk = true;
                }
                // A change of mode may let nftlet read what it could not.
                EventKind::Modify(ModifyKind::Metadata(_)) => self.walk = true,
                _ => {}
            }
        }
    }
}

fn is_link(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_symlink() || metadata.nlink() > 1)
}

struct Follower {
    /// Whether the first lists still wait for an object.
    holds_back: bool,
    paths: Vec<PathBuf>,
    state: State,
    watcher: RecommendedWatcher,
    /// Watched directories, with what they were when the watch was set: a directory that was
    /// removed and made again needs a new watch.
    watched: HashMap<PathBuf, (u64, u64)>,
    tree: Tree,
    /// What the last walk found changed without a sign that it is whole.
    unsettled: HashMap<PathBuf, Option<Stamp>>,
}

impl Follower {
    /// Whether an event at a path can matter.
    fn concerns(&self, path: &Path) -> bool {
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        // Kubernetes swaps the link `..data` when a mounted ConfigMap changes.
        name.starts_with(b"..")
            || self.tree.exact.contains(path)
            || self.tree.directories.contains(path)
            || (self.tree.directories.contains(&plain(parent(path))) && !is_hidden(path))
    }

    /// Reads what a batch asks for; returns the changes, and whether to look again soon.
    fn process(&mut self, batch: &Batch) -> (Vec<Event>, bool) {
        let mut events = Vec::new();
        if batch.walk {
            let notices = self.walk();
            events.extend(notices.into_iter().map(Event::Notice));
        }
        let mut wanted: BTreeSet<PathBuf> = BTreeSet::new();
        // A file may be reached through links, by a path other than the one that was written.
        for (path, stamp) in &self.tree.files {
            let written =
                batch.touched.contains(path) || self.reached_through(path, &batch.touched);
            let changed = batch.thorough && self.state.stamp(path) != Some(Some(*stamp));
            if written || changed {
                wanted.insert(path.clone());
            }
        }
        // A file written and closed for the first time is not in the last walk.
        for path in &batch.touched {
            let known_place = self.tree.directories.contains(&plain(parent(path)));
            if !wanted.contains(path) && known_place && files::is_manifest(path) && path.is_file() {
                wanted.insert(path.clone());
            }
        }
        let mut versions = Vec::new();
        let mut unsettled = HashMap::new();
        if batch.walk {
            for (path, found) in self.unexplained(&wanted) {
                if batch.thorough || self.unsettled.get(&path) == Some(&found) {
                    match found {
                        Some(_) => {
                            wanted.insert(path);
                        }
                        None => versions.push((path, Version::Gone)),
                    }
                } else {
                    unsettled.insert(path, found);
                }
            }
            self.unsettled = unsettled;
        } else {
            self.unsettled.retain(|path, _| !wanted.contains(path));
        }
        for path in wanted {
            let finished = batch.touched.contains(&path);
            match files::read(&path) {
                Ok((bytes, stamp)) => {
                    let stamp = Some(stamp);
                    versions.push((
                        path,
                        Version::Read {
                            bytes,
                            stamp,
                            finished,
                        },
                    ));
                }
                // It went away in between; a walk will tell.
                Err(fault) if fault.kind() == std::io::ErrorKind::NotFound => {}
                Err(fault) => versions.push((path, Version::Unreadable(fault))),
            }
        }
        let changes = self.state.update(versions);
        if self.holds_back && !self.state.is_empty() {
            self.holds_back = false;
            let notices = changes
                .into_iter()
                .filter(|event| matches!(event, Event::Notice(_)));
            events.extend(notices);
            events.extend(self.state.lists());
        } else {
            events.extend(changes);
        }
        (events, !self.unsettled.is_empty())
    }

    /// Files that came, were replaced or vanished since they were last read, apart from those
    /// that are about to be read anyway.
    fn unexplained(&self, wanted: &BTreeSet<PathBuf>) -> Vec<(PathBuf, Option<Stamp>)> {
        let mut found = Vec::new();
        for (path, stamp) in &self.tree.files {
            let same = match self.state.stamp(path) {
                Some(Some(known)) => known.same_file(stamp),
                // Could not be read, or was empty: try again when it has content.
                Some(None) | None => stamp.is_empty(),
            };
            if !same && !wanted.contains(path) {
                found.push((path.clone(), Some(*stamp)));
            }
        }
        for (path, _) in self.state.files() {
            if !is_standard_input(path)
                && !self.tree.files.contains_key(path)
                && !wanted.contains(path)
            {
                found.push((path.to_owned(), None));
            }
        }
        found
    }

    /// Whether a symbolic link leads through one of the touched places.
    fn reached_through(&self, path: &Path, touched: &BTreeSet<PathBuf>) -> bool {
        !touched.is_empty()
            && fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_symlink())
            && fs::canonicalize(path).is_ok_and(|target| {
                touched
                    .iter()
                    .any(|touched| fs::canonicalize(touched).is_ok_and(|touched| touched == target))
            })
    }

    /// Looks at all files again, watching directories that are new.
    fn walk(&mut self) -> Vec<Notice> {
        let (watcher, watched) = (&mut self.watcher, &mut self.watched);
        let mut notices = Vec::new();
        self.tree = Tree::walk(&self.paths, &mut |directory| {
            let directory = plain(directory);
            let Ok(metadata) = fs::metadata(&directory) else {
                return;
            };
            let identity = (metadata.dev(), metadata.ino());
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
        let exists = |directory: &PathBuf| directory.is_dir();
        watched.retain(|directory, _| {
            let keep = exists(directory);
            if !keep {
                let _ = watcher.unwatch(directory);
            }
            keep
        });
        notices
    }
}
