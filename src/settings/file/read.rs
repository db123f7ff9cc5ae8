//! Reads the fields of a file in place, so that an error has the line, the column and the path of
//! its field.
//!
//! Single values are read as text and parsed as on the command line. Null and an empty text leave
//! the default.

use std::collections::BTreeSet;
use std::fmt;

use serde::de::{
    DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor,
};

use super::fields::{FIELDS, Field, NAMED_SWITCH, UNUSED, Unused, UnusedType};
use super::in_one_line;
use crate::settings::{Error, Settings};

/// The content of a file.
#[derive(Default)]
pub(super) struct Content {
    pub(super) settings: Settings,
    pub(super) version: Option<String>,
    pub(super) kind: Option<String>,
    /// The paths of unknown fields, in the order of the file.
    pub(super) unknown: Vec<String>,
    /// The paths of fields without effect that cause a warning.
    pub(super) noted: BTreeSet<&'static str>,
    /// The entries of the list that is being read.
    entries: Vec<String>,
    /// The path of the value that is being read.
    pub(super) at: String,
}

impl Content {
    /// Reads a document. After an error, the fields before it are set, and [`Self::at`] has the path of
    /// the value with the error, if it is in a value.
    pub(super) fn read<'de, D: Deserializer<'de>>(&mut self, document: D) -> Result<(), D::Error> {
        let root = ValueReader {
            content: self,
            path: String::new(),
            known: PathKind::Group,
        };
        root.deserialize(document)
    }
}

/// What a path refers to.
#[derive(Clone, Copy)]
enum PathKind {
    Field(&'static Field),
    /// An entry of a list.
    Entry(&'static Field),
    Unused(&'static Unused),
    Group,
    Unknown,
}

impl PathKind {
    fn at(path: &str) -> Self {
        let is_below = |known: &str| {
            let rest = known.strip_prefix(path);
            rest.is_some_and(|rest| rest.starts_with('.'))
        };
        let paths = || {
            FIELDS
                .iter()
                .map(|it| it.path)
                .chain(UNUSED.iter().map(|it| it.path))
        };
        if let Some(field) = FIELDS.iter().find(|it| it.path == path) {
            Self::Field(field)
        } else if let Some(unused) = UNUSED.iter().find(|it| it.path == path) {
            Self::Unused(unused)
        } else if paths().any(is_below) {
            Self::Group
        } else {
            Self::Unknown
        }
    }
}

/// Reads the value at a path.
struct ValueReader<'a> {
    content: &'a mut Content,
    path: String,
    known: PathKind,
}

impl ValueReader<'_> {
    /// Returns a reader for a value in this one.
    fn inner(&mut self, path: String, known: PathKind) -> ValueReader<'_> {
        ValueReader {
            content: self.content,
            path,
            known,
        }
    }

    /// Adds a field without effect to the warnings, unless its value is usual.
    fn note_unless(&mut self, is_usual: bool) {
        if let PathKind::Unused(unused) = self.known
            && unused.is_noted
            && !is_usual
        {
            self.content.noted.insert(unused.path);
        }
    }

    fn empty<E: serde::de::Error>(&self) -> Result<(), E> {
        match self.known {
            PathKind::Entry(_) => Err(E::custom(Error::EmptyEntry)),
            _ => Ok(()),
        }
    }
}

impl<'de> DeserializeSeed<'de> for ValueReader<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, value: D) -> Result<(), D::Error> {
        self.content.at.clone_from(&self.path);
        match self.known {
            PathKind::Unknown => {
                self.content.unknown.push(in_one_line(&self.path));
                value.deserialize_ignored_any(IgnoredAny).map(drop)
            }
            _ => value.deserialize_option(self),
        }
    }
}

impl<'de> Visitor<'de> for ValueReader<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_none<E: serde::de::Error>(self) -> Result<(), E> {
        self.empty()
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
        self.empty()
    }

    fn visit_some<D: Deserializer<'de>>(self, value: D) -> Result<(), D::Error> {
        match self.known {
            PathKind::Field(Field { is_list: true, .. })
            | PathKind::Unused(Unused {
                kind: UnusedType::List,
                ..
            }) => value.deserialize_seq(self),
            PathKind::Group
            | PathKind::Unused(Unused {
                kind: UnusedType::Switches,
                ..
            }) => value.deserialize_map(self),
            _ => value.deserialize_str(self),
        }
    }

    fn visit_str<E: serde::de::Error>(mut self, text: &str) -> Result<(), E> {
        let text = text.trim();
        if text.is_empty() {
            return self.empty();
        }
        let settings = &mut self.content.settings;
        match self.known {
            PathKind::Field(field) => (field.read)(settings, text).map_err(E::custom),
            PathKind::Entry(field) => {
                // The whole list is read at its end.
                (field.read)(&mut settings.clone(), text).map_err(E::custom)?;
                self.content.entries.push(text.to_owned());
                Ok(())
            }
            PathKind::Unused(unused) => {
                match unused.path {
                    "apiVersion" => self.content.version = Some(text.to_owned()),
                    "kind" => self.content.kind = Some(text.to_owned()),
                    _ => {}
                }
                let is_usual = unused.is_usual(text).map_err(E::custom)?;
                self.note_unless(is_usual);
                Ok(())
            }
            PathKind::Group | PathKind::Unknown => Ok(()),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<(), A::Error> {
        let PathKind::Field(field) = self.known else {
            let mut is_empty = true;
            while list.next_element::<IgnoredAny>()?.is_some() {
                is_empty = false;
            }
            self.note_unless(is_empty);
            return Ok(());
        };
        self.content.entries.clear();
        for position in 0.. {
            let path = format!("{}[{position}]", self.path);
            let entry = self.inner(path, PathKind::Entry(field));
            if list.next_element_seed(entry)?.is_none() {
                break;
            }
            self.content.at.clone_from(&self.path);
        }
        let all = self.content.entries.join(",");
        (field.read)(&mut self.content.settings, &all).map_err(A::Error::custom)
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut group: A) -> Result<(), A::Error> {
        let mut is_empty = true;
        while let Some(name) = group.next_key::<String>()? {
            is_empty = false;
            let path = match self.path.as_str() {
                "" => name.clone(),
                above => format!("{above}.{name}"),
            };
            let known = match self.known {
                PathKind::Unused(_) => PathKind::Unused(&NAMED_SWITCH),
                // The path would be that of a field of a group.
                _ if name.contains('.') => PathKind::Unknown,
                _ => PathKind::at(&path),
            };
            group.next_value_seed(self.inner(path, known))?;
            self.content.at.clear();
        }
        self.note_unless(is_empty);
        Ok(())
    }
}
