//! Objects from manifest files: for nodes without a cluster, for tests and for dry runs.
//!
//! [`Manifests::load`] reads every file once and returns complete lists; [`Manifests::follow`]
//! then watches the files through inotify and sends only what changed.
//!
//! ```text
//! files (which, and their bytes) ─> yaml, json (documents, items, places)
//!        ─> contents (objects of one file) ─> state (all files, differences) ─> events
//! ```
//!
//! The rule for everything that goes wrong: it is reported with file, line and column, it does
//! not affect anything else, and what was known before stays in force. An object in two files
//! is taken from the file whose path sorts first.

mod contents;
mod files;
mod follow;
mod json;
mod news;
mod state;
mod tree;
mod yaml;

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use self::contents::Wanted;
use self::files::{Tree, plain};
use self::state::{State, Version, file_notice};
use crate::model::{Event, Reason};

/// Why manifests cannot be used at all.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A path of the command line does not exist or cannot be read.
    #[error("cannot read manifests from {}: {source}; name an existing file or directory that nftlet may read, or - for standard input", path.display())]
    Path {
        /// The path as it was given.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// There is no object where some are expected.
    #[error("{}", no_objects(paths))]
    Empty {
        /// The paths as they were given.
        paths: Vec<PathBuf>,
    },
    /// The kernel gives no way of noticing changes.
    #[error(
        "cannot watch manifests for changes: {source}; raise the sysctl fs.inotify.max_user_instances"
    )]
    Watch {
        /// What inotify said.
        source: notify::Error,
    },
}

/// Manifest files as a source of objects.
pub struct Manifests {
    paths: Vec<PathBuf>,
    state: State,
    allow_empty: bool,
}

fn no_objects(paths: &[PathBuf]) -> String {
    let paths: Vec<_> = paths
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    format!(
        "there are no objects in {}; the rules of an earlier run stay in force until there are \
         some (--allow-empty removes them)",
        paths.join(", ")
    )
}

/// The path that stands for standard input.
const STANDARD_INPUT: &str = "-";

impl Manifests {
    /// A source that reads `paths`: files, directories (with everything below them that ends in
    /// `.yaml`, `.yml` or `.json` and is not hidden), and `-` for standard input. Of the Nodes
    /// only `node_name` counts. Nothing is read yet.
    pub fn new(paths: Vec<PathBuf>, node_name: String) -> Self {
        Self {
            paths: paths.iter().map(|path| plain(path)).collect(),
            state: State::new(Wanted {
                node_name,
                network_policies: true,
            }),
            allow_empty: true,
        }
    }

    /// Takes manifests without any object for a mistake, such as a directory that is not mounted
    /// yet, unless `allowed`: no list is complete before the first object is there, so that the
    /// rules of an earlier run stay in force.
    #[must_use]
    pub fn with_allow_empty(mut self, allowed: bool) -> Self {
        self.allow_empty = allowed;
        self
    }

    /// Whether the lists are held back until there is an object.
    fn holds_back(&self) -> bool {
        !self.allow_empty && self.state.is_empty()
    }

    /// Checks that [`load`](Self::load) held nothing back.
    ///
    /// # Errors
    /// [`Error::Empty`] where it did.
    pub fn require_objects(&self) -> Result<(), Error> {
        if self.holds_back() {
            return Err(Error::Empty {
                paths: self.paths.clone(),
            });
        }
        Ok(())
    }

    /// The same with or without Pods, Namespaces and NetworkPolicies. Without, they are skipped
    /// silently, and no event is about them.
    #[must_use]
    pub fn with_network_policies(mut self, wanted: bool) -> Self {
        self.state.want_network_policies(wanted);
        self
    }

    /// Reads everything: notices about what cannot be used, then complete lists of every wanted
    /// [`Kind`](crate::model::Kind), unless those are held back
    /// ([`with_allow_empty`](Self::with_allow_empty)). Blocks while it reads; standard input is
    /// read to its end.
    ///
    /// # Errors
    /// [`Error::Path`] for a path of the command line that does not exist or cannot be read.
    /// Files that cannot be parsed are notices.
    pub fn load(&mut self) -> Result<Vec<Event>, Error> {
        let mut versions = Vec::new();
        let named: Vec<PathBuf> = self
            .paths
            .iter()
            .filter(|path| !is_standard_input(path))
            .cloned()
            .collect();
        if named.len() < self.paths.len() {
            let mut bytes = Vec::new();
            let path = PathBuf::from(STANDARD_INPUT);
            match io::stdin().read_to_end(&mut bytes) {
                Ok(_) => versions.push((
                    path,
                    Version::Read {
                        bytes,
                        stamp: None,
                        finished: true,
                    },
                )),
                Err(source) => return Err(Error::Path { path, source }),
            }
        }
        let tree = Tree::walk(&named, &mut |_| {});
        if let Some((path, source)) = tree.missing.into_iter().next() {
            return Err(Error::Path { path, source });
        }
        let mut events = Vec::new();
        for (path, fault) in tree.faults {
            if named.contains(&path) {
                return Err(Error::Path {
                    path,
                    source: fault,
                });
            }
            let message = format!("this cannot be read: {fault}; give nftlet access to it");
            events.push(Event::Notice(file_notice(
                &path,
                None,
                Reason::InvalidFile,
                message,
            )));
        }
        for path in tree.files.into_keys() {
            match files::read(&path) {
                Ok((bytes, stamp)) => {
                    let stamp = Some(stamp);
                    versions.push((
                        path,
                        Version::Read {
                            bytes,
                            stamp,
                            finished: true,
                        },
                    ));
                }
                Err(source) if named.contains(&path) => return Err(Error::Path { path, source }),
                Err(fault) => versions.push((path, Version::Unreadable(fault))),
            }
        }
        let changes = self.state.update(versions);
        events.extend(
            changes
                .into_iter()
                .filter(|event| matches!(event, Event::Notice(_))),
        );
        if !self.holds_back() {
            events.extend(self.state.lists());
        }
        Ok(events)
    }
}

fn is_standard_input(path: &Path) -> bool {
    path == Path::new(STANDARD_INPUT)
}
