//! What is known of every file, and what a new version of some of them changes.

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

/// One file as it was last understood.
#[derive(Debug, Default)]
struct KnownFile {
    stamp: Option<Stamp>,
    objects: BTreeMap<ObjectRef, Object>,
    /// What was said about it, so that saving it again does not repeat the same complaint.
    notices: Vec<Notice>,
}

/// All files, and which of them speaks for an object that several contain.
pub(super) struct ManifestStore {
    wanted: ManifestFilter,
    allow_empty: bool,
    /// Whether the complete lists were returned.
    listed: bool,
    converter: Converter,
    files: BTreeMap<Arc<Path>, KnownFile>,
    /// The files that contain an object, sorted: the first one counts.
    owners: HashMap<ObjectRef, SmallVec<[Arc<Path>; 1]>>,
}

/// A new version of a file.
pub(super) enum FileVersion {
    /// The bytes that were read.
    Read {
        bytes: Vec<u8>,
        stamp: Option<Stamp>,
        /// Whether the writer is done with it, so that an empty file is worth a notice.
        finished: bool,
    },
    /// It could not be read.
    Unreadable(std::io::Error),
    /// It is gone.
    Gone,
}

impl FileVersion {
    /// What a writer was done with when it was read.
    pub(super) fn whole(bytes: Vec<u8>, stamp: Option<Stamp>) -> Self {
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

    /// Takes or leaves what network policies are made of; to be chosen before anything is read.
    pub(super) fn want_network_policies(&mut self, wanted: bool) {
        self.wanted.network_policies = wanted;
    }

    /// Whether lists without any object are worth returning; otherwise the first object is waited
    /// for.
    pub(super) fn allow_empty(&mut self, allowed: bool) {
        self.allow_empty = allowed;
    }

    /// Whether [`update`](Self::update) returned complete lists.
    pub(super) fn is_listed(&self) -> bool {
        self.listed
    }

    /// The files that are known.
    pub(super) fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.keys().map(|path| &**path)
    }

    /// The version of a file that was read last; `None` also when it could not be read.
    pub(super) fn stamp(&self, path: &Path) -> Option<Stamp> {
        self.files.get(path)?.stamp
    }

    /// Every object in force, as complete lists of every kind that is wanted.
    fn lists(&self) -> Vec<Event> {
        let mut events = Vec::with_capacity(self.owners.len() + 2 * Kind::ALL.len());
        let mut names: Vec<&ObjectRef> = self.owners.keys().collect();
        names.sort_unstable();
        for &kind in self.wanted.kinds() {
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

    /// Takes new versions of files and returns what changes: the notices, then the objects that
    /// are new or different, then those that are gone. The order leaves no gap when an object is
    /// renamed. The first time, complete lists stand for the changes.
    pub(super) fn update(&mut self, versions: Vec<(PathBuf, FileVersion)>) -> Vec<Event> {
        let mut events = Vec::new();
        let mut before: BTreeMap<ObjectRef, Option<Object>> = BTreeMap::new();
        for (path, version) in versions {
            let path: Arc<Path> = Arc::from(path);
            let mut notices = Vec::new();
            let stamp = match &version {
                FileVersion::Read { stamp, .. } => *stamp,
                FileVersion::Unreadable(_) => None,
                FileVersion::Gone => {
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
            let news = known.notices.iter().filter(|notice| !old.contains(notice));
            events.extend(news.cloned().map(Event::Notice));
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

    /// What a version of a file says its objects are; `None` keeps what is known.
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
                        "the file cannot be read: {fault}; what was known of it stays in force"
                    ),
                );
            }
            FileVersion::Gone => return None,
        };
        let text = match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(fault) => {
                let usable = fault.as_bytes().get(..fault.utf8_error().valid_up_to());
                let message =
                    "the file is not UTF-8 text from here on; what was known of it stays in force";
                return unusable(
                    Some(Position::START.after(usable.unwrap_or_default())),
                    message.to_owned(),
                );
            }
        };
        let old = self.files.get(path).map(|known| &known.objects);
        if text.trim().is_empty() {
            // An editor empties a file before it writes it anew, or a disk ran full; in neither
            // case are all services to go.
            if finished && old.is_some_and(|old| !old.is_empty()) {
                let message = "the file is empty; what was known of it stays in force until it has \
                    content again (remove the file, or leave a comment in it, to drop its objects)";
                return unusable(None, message.to_owned());
            }
            return None;
        }
        let contents = contents::read(path, &text, &self.wanted, &mut self.converter);
        notices.extend(contents.notices.iter().cloned());
        Some(settle(contents, old))
    }

    /// Puts new objects in the place of a file's old ones. What was in force is noted in `before`,
    /// unless an earlier file did so.
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
                    "{name} is in {} too, which comes first; this copy is not used, remove one of \
                     them",
                    first.display()
                );
                notices.push(file_notice(unused, None, Reason::InvalidObject, message));
            }
        }
        self.files.entry(path.clone()).or_default().objects = objects;
    }
}

/// The objects of a new version of a file. What is damaged in it stays as it was known; where
/// something could not even be attributed, it may be any of the objects that are not there now.
fn settle(
    contents: Contents,
    old: Option<&BTreeMap<ObjectRef, Object>>,
) -> BTreeMap<ObjectRef, Object> {
    let mut objects = contents.objects;
    for (name, object) in old.into_iter().flatten() {
        if (contents.unreadable || contents.damaged.contains(name)) && !objects.contains_key(name) {
            objects.insert(name.clone(), object.clone());
        }
    }
    objects
}
