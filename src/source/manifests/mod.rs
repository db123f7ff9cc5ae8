//! Objects from manifest files, for nodes without a cluster, tests and dry runs.
//!
//! [`Manifests::load`] reads every file once and returns complete lists; [`Manifests::follow`]
//! then watches the files through inotify and sends only what changed.
//!
//! ```text
//! files (find, read) ─> documents (values, positions)
//!        ─> contents (objects of one file) ─> store (all files, differences) ─> events
//! ```
//!
//! An invalid object or file is reported with file, line and column and does not affect others; its
//! last valid state stays in force. An object in two files is read from the file whose path sorts
//! first.
//!
//! On a change every file is looked at, and only those with another inode, size or time are read. A
//! directory of 10,000 files, each with a Service and an EndpointSlice of 10 endpoints, takes 1.6 s
//! to read at first, and 75 ms from a changed file to its event (`cargo bench --bench micro -- manifests`, on
//! two busy cores of a virtual machine).

mod contents;
mod documents;
mod files;
mod follow;
mod notice;
mod store;

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use self::contents::ManifestFilter;
use self::files::{Tree, plain};
use self::notice::file_notice;
use self::store::{FileVersion, ManifestStore};
use crate::model::{Event, Reason};

/// Why manifests cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A path of the command line does not exist or cannot be read.
    #[error("cannot read manifests from {}: {source}; name an existing file or directory that nftlet may read, or - for standard input", path.display())]
    Path {
        /// The path as it was given.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The manifests contain no object.
    #[error("{}", no_objects(paths))]
    Empty {
        /// The paths as they were given.
        paths: Vec<PathBuf>,
    },
    /// inotify is not available.
    #[error(
        "cannot watch manifests for changes: {source}; raise the sysctl fs.inotify.max_user_instances"
    )]
    Watch {
        /// The cause.
        source: notify::Error,
    },
}

/// Manifest files as a source of objects.
pub struct Manifests {
    paths: Vec<PathBuf>,
    /// A document beside the files.
    document: Option<Vec<u8>>,
    state: ManifestStore,
}

fn no_objects(paths: &[PathBuf]) -> String {
    let paths: Vec<_> = paths
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    format!(
        "no objects found in {}; the rules of an earlier run stay in force until there are \
         some (--allow-empty removes them)",
        paths.join(", ")
    )
}

/// The path that stands for standard input.
const STANDARD_INPUT: &str = "-";

impl Manifests {
    /// Creates a source of `paths`: files, directories (all files below them that end in `.yaml`,
    /// `.yml` or `.json` and are not hidden), and `-` for standard input. Nodes other than
    /// `node_name` are used only for policies. Reads nothing yet.
    pub fn new(paths: Vec<PathBuf>, node_name: String) -> Self {
        Self {
            paths: paths.iter().map(|path| plain(path)).collect(),
            document: None,
            state: ManifestStore::new(ManifestFilter {
                node_name,
                services: true,
                network_policies: true,
            }),
        }
    }

    /// Adds a document, which [`load`](Self::load) reads once.
    #[must_use]
    pub(crate) fn with_document(mut self, document: Vec<u8>) -> Self {
        self.document = Some(document);
        self
    }

    /// Sets whether manifests may contain no object. If not, which is taken for a mistake such as a
    /// directory that is not mounted yet, no list is complete before the first object, so that the
    /// rules of an earlier run stay in force.
    #[must_use]
    pub(crate) fn with_allow_empty(mut self, allowed: bool) -> Self {
        self.state.allow_empty(allowed);
        self
    }

    /// Checks that [`load`](Self::load) returned complete lists.
    ///
    /// # Errors
    /// [`Error::Empty`] if it did not.
    pub(crate) fn require_objects(&self) -> Result<(), Error> {
        if !self.state.is_listed() {
            return Err(Error::Empty {
                paths: self.paths.clone(),
            });
        }
        Ok(())
    }

    /// Sets whether Services, EndpointSlices and ServiceCIDRs are used. If not, they are skipped
    /// without a notice.
    #[must_use]
    pub fn with_services(mut self, wanted: bool) -> Self {
        self.state.want_services(wanted);
        self
    }

    /// Sets whether the kinds of policies and the other Nodes are used. If not, they are skipped
    /// without a notice.
    #[must_use]
    pub fn with_network_policies(mut self, wanted: bool) -> Self {
        self.state.want_network_policies(wanted);
        self
    }

    /// Reads all files. Returns notices about what cannot be used, then complete lists of the used
    /// kinds, except where `with_allow_empty` holds those back. Blocks while it reads; standard
    /// input is read to its end.
    ///
    /// # Errors
    /// [`Error::Path`] for a path of the command line that does not exist or cannot be read.
    /// Files that cannot be parsed are notices.
    pub fn load(&mut self) -> Result<Vec<Event>, Error> {
        let error = |path: &Path, source| Error::Path {
            path: path.to_owned(),
            source,
        };
        let mut versions = Vec::new();
        let (input, named): (Vec<PathBuf>, Vec<PathBuf>) = self
            .paths
            .iter()
            .cloned()
            .partition(|path| is_standard_input(path));
        if let Some(path) = input.into_iter().next() {
            let mut bytes = Vec::new();
            io::stdin()
                .read_to_end(&mut bytes)
                .map_err(|source| error(&path, source))?;
            versions.push((path, FileVersion::finished(bytes, None)));
        }
        if let Some(document) = self.document.take() {
            let path = PathBuf::from(STANDARD_INPUT);
            versions.push((path, FileVersion::finished(document, None)));
        }
        let tree = Tree::walk(&named, &mut |_| {});
        let mut events = Vec::new();
        for (path, fault) in tree.missing.into_iter().chain(tree.faults) {
            if named.contains(&path) {
                return Err(error(&path, fault));
            }
            let message = format!("cannot be read: {fault}; give nftlet access to it");
            let notice = file_notice(&path, None, Reason::InvalidFile, message);
            events.push(Event::Notice(notice));
        }
        for path in tree.files.into_keys() {
            match files::read(&path) {
                Ok((bytes, stamp)) => {
                    versions.push((path, FileVersion::finished(bytes, Some(stamp))))
                }
                Err(source) if named.contains(&path) => return Err(error(&path, source)),
                Err(fault) => versions.push((path, FileVersion::Unreadable(fault))),
            }
        }
        events.extend(self.state.update(versions));
        Ok(events)
    }
}

fn is_standard_input(path: &Path) -> bool {
    path == Path::new(STANDARD_INPUT)
}
