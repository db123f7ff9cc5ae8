//! The last valid content of every file, and the changes by new versions.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use smallvec::SmallVec;

use super::contents::{self, Contents, ManifestFilter};
use super::documents::Position;
use super::files::Stamp;
use super::notice::file_notice;
use crate::model::{Event, Kind, Notice, Object, ObjectRef, Reason};
use crate::source::convert::Converter;

/// The last valid content of a file.
#[derive(Debug, Default)]
struct KnownFile {
    stamp: Option<Stamp>,
    objects: BTreeMap<ObjectRef, Object>,
    /// The last notices, so that saving the file again does not repeat them.
    notices: Vec<Notice>,
}

/// All files, and which of them is used for an object that several contain.
pub(super) struct ManifestStore {
    wanted: ManifestFilter,
    allow_empty: bool,
    /// Whether the complete lists were returned.
    listed: bool,
    converter: Converter,
    files: BTreeMap<Arc<Path>, KnownFile>,
    /// The files that contain an object, sorted; the first one is used.
    owners: HashMap<ObjectRef, SmallVec<[Arc<Path>; 1]>>,
}

pub(super) enum FileVersion {
    Read {
        bytes: Vec<u8>,
        stamp: Option<Stamp>,
        /// Whether its writer has closed it, so that an empty file is reported.
        finished: bool,
    },
    Unreadable(std::io::Error),
    Removed,
}

impl FileVersion {
    /// Creates a version that its writer has closed.
    pub(super) fn finished(bytes: Vec<u8>, stamp: Option<Stamp>) -> Self {
        Self::Read {
            bytes,
            stamp,
            finished: true,
        }
    }
}

impl ManifestStore {
    pub(super) fn new(wanted: ManifestFilter) -> Self {
        Self {
            wanted,
            allow_empty: true,
            listed: false,
            converter: Converter::default(),
            files: BTreeMap::new(),
            owners: HashMap::new(),
        }
    }

    /// Sets whether Services, EndpointSlices and ServiceCIDRs are used. Must be called before
    /// [`update`](Self::update).
    pub(super) fn want_services(&mut self, wanted: bool) {
        self.wanted.services = wanted;
    }

    /// Sets whether the kinds of policies are used. Must be called before
    /// [`update`](Self::update).
    pub(super) fn want_network_policies(&mut self, wanted: bool) {
        self.wanted.network_policies = wanted;
    }

    /// Sets whether lists are returned before the first object was read.
    pub(super) fn allow_empty(&mut self, allowed: bool) {
        self.allow_empty = allowed;
    }

    /// Returns whether [`update`](Self::update) returned complete lists.
    pub(super) fn is_listed(&self) -> bool {
        self.listed
    }

    /// Returns the known files.
    pub(super) fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.keys().map(|path| &**path)
    }

    /// Returns the stamp of the last version of a file. `None` also if it could not be read.
    pub(super) fn stamp(&self, path: &Path) -> Option<Stamp> {
        self.files.get(path)?.stamp
    }

    /// Returns all objects, as complete lists of the used kinds.
    fn lists(&self) -> Vec<Event> {
        let mut events = Vec::with_capacity(self.owners.len() + 2 * Kind::ALL.len());
        let mut names: Vec<&ObjectRef> = self.owners.keys().collect();
        names.sort_unstable();
        for kind in self.wanted.kinds() {
            events.push(Event::ListStarted(kind));
            let of_kind = names.iter().filter(|name| name.kind == kind);
            events
                .extend(of_kind.filter_map(|name| self.in_force(name).cloned().map(Event::Apply)));
            events.push(Event::ListComplete(kind));
        }
        events
    }

    fn in_force(&self, name: &ObjectRef) -> Option<&Object> {
        let first = self.owners.get(name)?.first()?;
        self.files.get(first)?.objects.get(name)
    }

    /// Applies new versions of files. Returns the notices, then new and changed objects, then
    /// deletions; in this order an object that moves to another file or name leaves no gap. The first
    /// time, complete lists are returned in place of the changes.
    pub(super) fn update(&mut self, versions: Vec<(PathBuf, FileVersion)>) -> Vec<Event> {
        let mut events = Vec::new();
        let mut before: BTreeMap<ObjectRef, Option<Object>> = BTreeMap::new();
        for (path, version) in versions {
            let path: Arc<Path> = Arc::from(path);
            let mut notices = Vec::new();
            let stamp = match &version {
                FileVersion::Read { stamp, .. } => *stamp,
                FileVersion::Unreadable(_) => None,
                FileVersion::Removed => {
                    self.replace(&path, BTreeMap::new(), &mut before, &mut notices);
                    self.files.remove(&path);
                    continue;
                }
            };
            if let Some(objects) = self.objects_of(&path, version, &mut notices) {
                self.replace(&path, objects, &mut before, &mut notices);
            }
            let known = self.files.entry(path).or_default();
            known.stamp = stamp;
            let old = std::mem::replace(&mut known.notices, notices);
            let changes = known.notices.iter().filter(|notice| !old.contains(notice));
            events.extend(changes.cloned().map(Event::Notice));
        }
        if !self.listed {
            self.listed = self.allow_empty || !self.owners.is_empty();
            if self.listed {
                events.extend(self.lists());
            }
            return events;
        }
        let mut gone = Vec::new();
        for (name, old) in before {
            match (old, self.in_force(&name)) {
                (Some(old), Some(new)) if old == *new => {}
                (_, Some(new)) => events.push(Event::Apply(new.clone())),
                (Some(_), None) => gone.push(Event::Delete(name)),
                (None, None) => {}
            }
        }
        events.extend(gone);
        events
    }

    /// Parses a version of a file. Returns `None` if its last valid content must be kept.
    fn objects_of(
        &mut self,
        path: &Path,
        version: FileVersion,
        notices: &mut Vec<Notice>,
    ) -> Option<BTreeMap<ObjectRef, Object>> {
        let mut unusable = |at: Option<Position>, message: String| {
            notices.push(file_notice(path, at, Reason::InvalidFile, message));
            None
        };
        let (bytes, finished) = match version {
            FileVersion::Read {
                bytes, finished, ..
            } => (bytes, finished),
            FileVersion::Unreadable(fault) => {
                return unusable(
                    None,
                    format!(
                        "the file cannot be read: {fault}; its last valid content stays in force"
                    ),
                );
            }
            FileVersion::Removed => return None,
        };
        let text = match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(fault) => {
                let usable = fault.as_bytes().get(..fault.utf8_error().valid_up_to());
                let message = "the file is not UTF-8 text from here on; its last valid content stays in force";
                return unusable(
                    Some(Position::START.after(usable.unwrap_or_default())),
                    message.to_owned(),
                );
            }
        };
        let old = self.files.get(path).map(|known| &known.objects);
        if text.trim().is_empty() {
            // An editor empties a file before it writes it, and a full disk leaves it empty. Neither
            // may delete all services.
            if finished && old.is_some_and(|old| !old.is_empty()) {
                let message = "the file is empty; its last valid content stays in force until it has \
                    content again (to delete its objects, remove the file or write a comment into it)";
                return unusable(None, message.to_owned());
            }
            return None;
        }
        let contents = contents::read(path, &text, &self.wanted, &mut self.converter);
        notices.extend(contents.notices.iter().cloned());
        Some(keep_invalid(contents, old))
    }

    /// Replaces the objects of a file. Records in `before` what was in force before the first
    /// replacement.
    fn replace(
        &mut self,
        path: &Arc<Path>,
        objects: BTreeMap<ObjectRef, Object>,
        before: &mut BTreeMap<ObjectRef, Option<Object>>,
        notices: &mut Vec<Notice>,
    ) {
        let old = self
            .files
            .get(path)
            .map(|known| known.objects.keys().cloned().collect::<Vec<_>>());
        let old = old.unwrap_or_default();
        for name in old.iter().chain(objects.keys()) {
            if !before.contains_key(name) {
                before.insert(name.clone(), self.in_force(name).cloned());
            }
        }
        for name in old.iter().filter(|name| !objects.contains_key(*name)) {
            if let Some(owners) = self.owners.get_mut(name) {
                owners.retain(|owner| owner != path);
                if owners.is_empty() {
                    self.owners.remove(name);
                }
            }
        }
        for name in objects.keys() {
            let owners = self.owners.entry(name.clone()).or_default();
            if let Err(place) = owners.binary_search(path) {
                owners.insert(place, path.clone());
            }
            if let [first, second, ..] = owners.as_slice() {
                let unused = if first == path { second } else { path };
                let message = format!(
                    "{name} is also in {}, which has precedence; this copy is not used, remove one of \
                     them",
                    first.display()
                );
                notices.push(file_notice(unused, None, Reason::InvalidObject, message));
            }
        }
        self.files.entry(path.clone()).or_default().objects = objects;
    }
}

/// Returns the objects of a new version of a file. Invalid ones keep their last valid state. If a
/// part of the file has no readable name, it may be any object that the new version lacks, so all of
/// them are kept.
fn keep_invalid(
    contents: Contents,
    old: Option<&BTreeMap<ObjectRef, Object>>,
) -> BTreeMap<ObjectRef, Object> {
    let mut objects = contents.objects;
    for (name, object) in old.into_iter().flatten() {
        if (contents.unnamed || contents.invalid.contains(name)) && !objects.contains_key(name) {
            objects.insert(name.clone(), object.clone());
        }
    }
    objects
}
