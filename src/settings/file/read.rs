//! Reads the fields of a file at the places where they stand, so that an error has the line, the
//! column and the path of its field.
//!
//! Single values are read as text and parsed as on the command line. Null and an empty text leave
//! the default.

use std::collections::BTreeSet;
use std::fmt;

use serde::de::{
    DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor,
};

use super::fields::{FIELDS, Field, Kind, NAMED_SWITCH, UNUSED, Unused};
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
    /// The paths of fields without effect that are worth a warning.
    pub(super) noted: BTreeSet<&'static str>,
    /// The entries of the list that is being read.
    entries: Vec<String>,
    /// The path of the value that is being read.
    pub(super) at: String,
}

impl Content {
    /// Reads a document. After an error, what was read before is there, and [`Self::at`] has the path
    /// of the value with the error, if it is in a value.
    pub(super) fn read<'de, D: Deserializer<'de>>(&mut self, document: D) -> Result<(), D::Error> {
        let root = Reader {
            content: self,
            path: String::new(),
            known: Known::Group,
        };
        root.deserialize(document)
    }
}

/// What is known of a path.
#[derive(Clone, Copy)]
enum Known {
    Field(&'static Field),
    /// An entry of a list.
    Entry(&'static Field),
    Unused(&'static Unused),
    Group,
    Nothing,
}

impl Known {
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
            Self::Nothing
        }
    }
}

/// Reads the value at a path.
struct Reader<'a> {
    content: &'a mut Content,
    path: String,
    known: Known,
}

impl Reader<'_> {
    /// A reader for a value inside of this one.
    fn inner(&mut self, path: String, known: Known) -> Reader<'_> {
        Reader {
            content: self.content,
            path,
            known,
        }
    }

    /// Notes a field without effect that is worth a warning.
    fn note_unless(&mut self, is_usual: bool) {
        if let Known::Unused(unused) = self.known
            && unused.is_noted
            && !is_usual
        {
            self.content.noted.insert(unused.path);
        }
    }

    fn empty<E: serde::de::Error>(&self) -> Result<(), E> {
        match self.known {
            Known::Entry(_) => Err(E::custom(Error::EmptyEntry)),
            _ => Ok(()),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Reader<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, value: D) -> Result<(), D::Error> {
        self.content.at.clone_from(&self.path);
        match self.known {
            Known::Nothing => {
                self.content.unknown.push(in_one_line(&self.path));
                value.deserialize_ignored_any(IgnoredAny).map(drop)
            }
            _ => value.deserialize_option(self),
        }
    }
}

impl<'de> Visitor<'de> for Reader<'_> {
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
            Known::Field(Field { is_list: true, .. })
            | Known::Unused(Unused {
                kind: Kind::List, ..
            }) => value.deserialize_seq(self),
            Known::Group
            | Known::Unused(Unused {
                kind: Kind::Switches,
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
            Known::Field(field) => (field.read)(settings, text).map_err(E::custom),
            Known::Entry(field) => {
                // The list as a whole is read at its end.
                (field.read)(&mut settings.clone(), text).map_err(E::custom)?;
                self.content.entries.push(text.to_owned());
                Ok(())
            }
            Known::Unused(unused) => {
                match unused.path {
                    "apiVersion" => self.content.version = Some(text.to_owned()),
                    "kind" => self.content.kind = Some(text.to_owned()),
                    _ => {}
                }
                let is_usual = unused.is_usual(text).map_err(E::custom)?;
                self.note_unless(is_usual);
                Ok(())
            }
            Known::Group | Known::Nothing => Ok(()),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<(), A::Error> {
        let Known::Field(field) = self.known else {
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
            let entry = self.inner(path, Known::Entry(field));
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
                Known::Unused(_) => Known::Unused(&NAMED_SWITCH),
                // It would look like a field of a group.
                _ if name.contains('.') => Known::Nothing,
                _ => Known::at(&path),
            };
            group.next_value_seed(self.inner(path, known))?;
            self.content.at.clear();
        }
        self.note_unless(is_empty);
        Ok(())
    }
}
