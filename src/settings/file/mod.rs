//! The configuration file of kube-proxy, `KubeProxyConfiguration` (kubeproxy.config.k8s.io/v1alpha1).
//!
//! A zero value, an empty text and null mean the default, as in kube-proxy. Under `conntrack` only
//! null does: zero leaves the kernel's value. An error is one line with the file, line, column and
//! field.

mod fields;
mod follow;
mod read;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

pub(super) use self::fields::FIELDS;
pub(crate) use self::fields::effective;
pub(crate) use self::follow::{Ended, follow};
use self::read::Content;
use super::Settings;

/// The key of the configuration in `/configz`, as in kube-proxy.
pub(crate) const GROUP: &str = "kubeproxy.config.k8s.io";

/// The largest file that is read: ConfigMaps have at most 1 MiB.
const LARGEST: u64 = 1 << 20;

/// Why a configuration file is not valid.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error("cannot read the configuration {}: {source}; give --config a file that nftlet may read", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: this is {found}; --config needs a KubeProxyConfiguration of {VERSION}", path.display())]
    Kind { path: PathBuf, found: String },
    #[error("{}{position}: {field}{message}", path.display())]
    Field {
        path: PathBuf,
        /// `:line:column`, if it is known.
        position: String,
        /// The path of the field with a colon, if it is known.
        field: String,
        message: String,
    },
    #[error("cannot follow the changes of {}: {source}; raise the sysctl fs.inotify.max_user_instances", path.display())]
    Follow {
        path: PathBuf,
        source: notify::Error,
    },
}

const VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
const KIND: &str = "KubeProxyConfiguration";

/// A valid configuration file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct File {
    settings: Settings,
    notes: Vec<String>,
}

impl File {
    /// Reads a file. Returns the first error in it.
    pub(crate) fn read(path: &Path) -> Result<Self, Error> {
        let text = read(path).map_err(|source| Error::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(path, &text)
    }

    /// Parses the text of a file. The path is for messages.
    pub(crate) fn parse(path: &Path, text: &str) -> Result<Self, Error> {
        let mut content = Content::default();
        let read = serde_saphyr::with_deserializer_from_str(text, |yaml| content.read(yaml));
        let kind = match (content.version.as_deref(), content.kind.as_deref()) {
            (Some(VERSION), Some(KIND)) => None,
            (Some(version), Some(kind)) => Some(in_one_line(&format!("a {kind} of {version}"))),
            // They may follow the error.
            _ if read.is_err() => None,
            (None, _) => Some("an object without apiVersion".to_owned()),
            (_, None) => Some("an object without kind".to_owned()),
        };
        if let Some(found) = kind {
            let path = path.to_owned();
            return Err(Error::Kind { path, found });
        }
        let fault = |position: String, field: &str, message: String| Error::Field {
            path: path.to_owned(),
            position,
            field: match field {
                "" => String::new(),
                field => format!("{}: ", in_one_line(field)),
            },
            message,
        };
        read.map_err(|error| {
            let place = error.location();
            let place = place.map(|at| format!(":{}:{}", at.line(), at.column()));
            fault(place.unwrap_or_default(), &content.at, message(&error))
        })?;
        let lacks = match content.settings.detect_local() {
            Err(super::Error::NoBridge) => Some((
                "detectLocal.bridgeInterface",
                "the bridge of the pods, for example cni0",
            )),
            Err(super::Error::NoPrefix) => Some((
                "detectLocal.interfaceNamePrefix",
                "the prefix of the pods' interfaces, for example veth",
            )),
            _ => None,
        };
        if let Some((field, what)) = lacks {
            let message = format!("the value is empty, and detectLocalMode needs {what}");
            return Err(fault(String::new(), field, message));
        }
        let notes = notes(&content);
        // Each mode means nftables.
        content.settings.proxy_mode = super::ProxyMode::default();
        let settings = content.settings;
        Ok(Self { settings, notes })
    }

    /// Returns the settings of the fields, and the defaults of the others.
    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Returns warnings about fields of the file without effect.
    pub(crate) fn notes(&self) -> &[String] {
        &self.notes
    }
}

/// Returns a warning for each group of fields without effect. kubeadm and kube-proxy write every
/// field, so there is none about zero and kube-proxy's default.
fn notes(content: &Content) -> Vec<String> {
    let noted = content.noted.iter().map(|path| (*path).to_owned());
    let (of_others, unused): (Vec<_>, Vec<_>) =
        noted.partition(|path| fields::is_of_other_mode(path));
    let mode = content.settings.proxy_mode;
    let mut notes: Vec<String> = mode.note().into_iter().collect();
    for (paths, what) in [
        (
            &content.unknown,
            "fields that KubeProxyConfiguration does not have",
        ),
        (
            &of_others,
            "fields of other modes have no effect; set those of nftables instead",
        ),
        (&unused, "fields that nftlet does not use"),
    ] {
        if !paths.is_empty() {
            notes.push(format!("{what}: {}", paths.join(", ")));
        }
    }
    notes
}

fn read(path: &Path) -> io::Result<String> {
    let size = fs::metadata(path)?.len();
    if size > LARGEST {
        let message = format!("it has {size} bytes; the limit is {LARGEST}");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
    }
    fs::read_to_string(path)
}

/// Replaces control characters of a text from the file.
fn in_one_line(text: &str) -> String {
    let shown = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().map(shown).collect()
}

/// Returns the message of an error, in the terms of the file instead of the library's.
fn message(error: &serde_saphyr::Error) -> String {
    let error = error.without_snippet();
    match error {
        serde_saphyr::Error::MultipleDocuments { .. } => {
            return "the file has several documents; keep only the configuration".to_owned();
        }
        serde_saphyr::Error::DuplicateMappingKey { key, .. } => {
            let field = key.as_deref().unwrap_or("a field");
            return format!("{field} is given twice; remove one of them");
        }
        _ => {}
    }
    let text = error.to_string();
    let place = error
        .location()
        .map(|at| format!(" at line {}, column {}", at.line(), at.column()));
    let text = place
        .and_then(|place| text.strip_suffix(&place))
        .unwrap_or(&text);
    let wanted = match text {
        "expected mapping start" => "fields with values",
        "expected sequence start" => "a list",
        "expected string scalar" => "a single value",
        other => return in_one_line(other),
    };
    format!("the value has the wrong type; write {wanted}")
}

#[cfg(test)]
mod tests;
