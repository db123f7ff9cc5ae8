//! What is known of every file, and what a new version of some of them changes.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use smallvec::SmallVec;

use super::contents::{self, Contents, Wanted};
use super::files::Stamp;
use super::tree::Position;
use crate::model::{Event, Kind, Notice, Object, ObjectRef, Reason, Subject};
use crate::source::convert::Converter;

/// One file as it was last understood.
#[derive(Debug, Default)]
struct Known {
    stamp: Option<Stamp>,
    objects: BTreeMap<ObjectRef, Object>,
    /// What was said about it, so that saving it again does not repeat the same complaint.
    notices: Vec<Notice>,
}

/// All files, and which of them speaks for an object that several contain.
pub(super) struct State {
    wanted: Wanted,
    converter: Converter,
    files: BTreeMap<Arc<Path>, Known>,
    /// The files that contain an object, sorted: the first one counts.
    owners: HashMap<ObjectRef, SmallVec<[Arc<Path>; 1]>>,
}

/// A new version of a file.
pub(super) enum Version {
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

impl State {
    pub(super) fn new(wanted: Wanted) -> Self {
        Self {
            wanted,
            converter: Converter::default(),
            files: BTreeMap::new(),
            owners: HashMap::new(),
        }
    }

    /// Takes or leaves what network policies are made of; to be chosen before anything is read.
    pub(super) fn want_network_policies(&mut self, wanted: bool) {
        self.wanted.network_policies = wanted;
    }

    /// The files that are known, with the version that was read last.
    pub(super) fn files(&self) -> impl Iterator<Item = (&Path, Option<Stamp>)> {
        self.files
            .iter()
            .map(|(path, known)| (&**path, known.stamp))
    }

    /// The version of a file that was read last, if it is known.
    pub(super) fn stamp(&self, path: &Path) -> Option<Option<Stamp>> {
        self.files.get(path).map(|known| known.stamp)
    }

    /// Whether no file has an object.
    pub(super) fn is_empty(&self) -> bool {
        self.owners.is_empty()
    }

    /// Every object in force, as complete lists of every kind that is wanted.
    pub(super) fn lists(&self) -> Vec<Event> {
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
    /// renamed.
    pub(super) fn update(&mut self, versions: Vec<(PathBuf, Version)>) -> Vec<Event> {
        let mut events = Vec::new();
        let mut before: BTreeMap<ObjectRef, Option<Object>> = BTreeMap::new();
        for (path, version) in versions {
            let path: Arc<Path> = Arc::from(path);
            let mut notices = Vec::new();
            let objects = self.objects_of(&path, version, &mut notices);
            let old_notices = match objects {
                Some(Replacement::Objects(objects, stamp)) => {
                    self.replace(&path, objects, stamp, &mut before, &mut notices)
                }
                Some(Replacement::Nothing) => {
                    self.replace(&path, BTreeMap::new(), None, &mut before, &mut notices);
                    self.files.remove(&path);
                    continue;
                }
                None => {
                    let known = self.files.entry(path.clone()).or_default();
                    std::mem::take(&mut known.notices)
                }
            };
            let news = notices
                .iter()
                .filter(|notice| !old_notices.contains(notice));
            events.extend(news.cloned().map(Event::Notice));
            if let Some(known) = self.files.get_mut(&path) {
                known.notices = notices;
            }
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
        version: Version,
        notices: &mut Vec<Notice>,
    ) -> Option<Replacement> {
        let (bytes, stamp, finished) = match version {
            Version::Read {
                bytes,
                stamp,
                finished,
            } => (bytes, stamp, finished),
            Version::Gone => return Some(Replacement::Nothing),
            Version::Unreadable(fault) => {
                let message = format!(
                    "the file cannot be read: {fault}; what was known of it stays in force"
                );
                notices.push(file_notice(path, None, Reason::InvalidFile, message));
                return None;
            }
        };
        let text = match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(fault) => {
                let at = end_of(fault.as_bytes().get(..fault.utf8_error().valid_up_to()));
                let message =
                    "the file is not UTF-8 text from here on; what was known of it stays in force";
                notices.push(file_notice(
                    path,
                    Some(at),
                    Reason::InvalidFile,
                    message.to_owned(),
                ));
                return None;
            }
        };
        let known = self.files.get(path);
        if text.trim().is_empty() {
            // An editor empties a file before it writes it anew, or a disk ran full; either way
            // nobody meant to take all services away.
            if finished && known.is_some_and(|known| !known.objects.is_empty()) {
                let message = "the file is empty; what was known of it stays in force until it has \
                    content again (remove the file, or leave a comment in it, to drop its objects)";
                notices.push(file_notice(
                    path,
                    None,
                    Reason::InvalidFile,
                    message.to_owned(),
                ));
            }
            return None;
        }
        let contents = contents::read(path, &text, &self.wanted, &mut self.converter);
        let old = known.map(|known| &known.objects);
        Some(Replacement::Objects(
            settle(path, contents, old, notices),
            stamp,
        ))
    }

    /// Puts new objects in the place of a file's old ones; returns what was said about the old.
    fn replace(
        &mut self,
        path: &Arc<Path>,
        objects: BTreeMap<ObjectRef, Object>,
        stamp: Option<Stamp>,
        before: &mut BTreeMap<ObjectRef, Option<Object>>,
        notices: &mut Vec<Notice>,
    ) -> Vec<Notice> {
        let old = self.files.remove(path).unwrap_or_default();
        // Looking up what was in force needs the old version of this very file.
        for name in old.objects.keys().chain(objects.keys()) {
            if before.contains_key(name) {
                continue;
            }
            let speaker = self.owners.get(name).and_then(|owners| owners.first());
            let object = match speaker {
                Some(speaker) if speaker == path => old.objects.get(name),
                Some(_) => self.in_force(name),
                None => None,
            };
            before.insert(name.clone(), object.cloned());
        }
        for name in old
            .objects
            .keys()
            .filter(|name| !objects.contains_key(*name))
        {
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
            if let [first, rest @ ..] = owners.as_slice()
                && let Some(other) = rest.first()
            {
                let (loser, message) = if first == path {
                    (
                        other,
                        format!("{name} is in {} too, which comes first", first.display()),
                    )
                } else {
                    (
                        path,
                        format!("{name} is in {} too, which comes first", first.display()),
                    )
                };
                let message = format!("{message}; this copy is not used, remove one of them");
                notices.push(file_notice(loser, None, Reason::InvalidObject, message));
            }
        }
        let notices = old.notices;
        self.files.insert(
            path.clone(),
            Known {
                stamp,
                objects,
                notices: Vec::new(),
            },
        );
        notices
    }
}

enum Replacement {
    Objects(BTreeMap<ObjectRef, Object>, Option<Stamp>),
    Nothing,
}

/// The objects of a new version of a file. What is damaged in it stays as it was known; where
/// something could not even be attributed, it may be any of the objects that are not there now.
fn settle(
    path: &Path,
    contents: Contents,
    old: Option<&BTreeMap<ObjectRef, Object>>,
    notices: &mut Vec<Notice>,
) -> BTreeMap<ObjectRef, Object> {
    let mut objects = BTreeMap::new();
    notices.extend(contents.notices);
    for (object, at) in contents.objects {
        let name = object.reference();
        match objects.entry(name) {
            Entry::Vacant(place) => {
                place.insert(object);
            }
            Entry::Occupied(first) => {
                let message = format!(
                    "{} is in this file twice; the first one counts, remove this one",
                    first.key()
                );
                notices.push(file_notice(path, Some(at), Reason::InvalidObject, message));
            }
        }
    }
    let damaged: BTreeSet<ObjectRef> = contents.damaged.into_iter().collect();
    for (name, object) in old.into_iter().flatten() {
        if (contents.unreadable || damaged.contains(name)) && !objects.contains_key(name) {
            objects.insert(name.clone(), object.clone());
        }
    }
    objects
}

pub(super) fn file_notice(
    path: &Path,
    at: Option<Position>,
    reason: Reason,
    message: String,
) -> Notice {
    Notice {
        subject: Subject::File {
            path: path.to_owned(),
            position: at.map(|at| (at.line, at.column)),
        },
        reason,
        message,
    }
}

/// The place just after some text.
fn end_of(text: Option<&[u8]>) -> Position {
    let text = text.unwrap_or_default();
    let lines = text.iter().filter(|byte| **byte == b'\n').count();
    let last = text
        .rsplit(|byte| *byte == b'\n')
        .next()
        .unwrap_or_default();
    Position {
        line: lines as u64 + 1,
        column: String::from_utf8_lossy(last).chars().count() as u64 + 1,
    }
}
