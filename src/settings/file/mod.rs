//! The configuration file of kube-proxy, `KubeProxyConfiguration` (kubeproxy.config.k8s.io/v1alpha1).
//!
//! A zero value, an empty text and null mean the default, as with kube-proxy. Under `conntrack`
//! only null does: zero leaves the kernel's value. What cannot be used is one line with the place
//! and the name of the field.

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
use super::{CommandLine, Settings};

/// The name under which `/configz` shows the configuration, as with kube-proxy.
pub(crate) const GROUP: &str = "kubeproxy.config.k8s.io";

/// The largest file that is read: ConfigMaps have at most 1 MiB.
const LARGEST: u64 = 1 << 20;

/// Why a configuration file cannot be used.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error("cannot read the configuration {}: {source}; name a file that nftlet may read with --config", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: this is {found}; --config wants a KubeProxyConfiguration of {VERSION}", path.display())]
    Kind { path: PathBuf, found: String },
    #[error("{}{place}: {field}{message}", path.display())]
    Field {
        path: PathBuf,
        /// `:line:column`, where it is known.
        place: String,
        /// The path of the field with a colon, where it is known.
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

/// A configuration file that can be used.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct File {
    settings: Settings,
    notes: Vec<String>,
}

impl File {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// The first fault that keeps it from being used.
    pub(crate) fn read(path: &Path) -> Result<Self, Error> {
        let text = read(path).map_err(|source| Error::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(path, &text)
    }

    /// Parses the text of a file. The path is for messages.
    fn parse(path: &Path, text: &str) -> Result<Self, Error> {
        let mut content = Content::default();
        let read = serde_saphyr::with_deserializer_from_str(text, |yaml| content.read(yaml));
        let kind = match (content.version.as_deref(), content.kind.as_deref()) {
            (Some(VERSION), Some(KIND)) => None,
            (Some(version), Some(kind)) => Some(in_one_line(&format!("a {kind} of {version}"))),
            // They may stand behind the fault.
            _ if read.is_err() => None,
            (None, _) => Some("an object without apiVersion".to_owned()),
            (_, None) => Some("an object without kind".to_owned()),
        };
        if let Some(found) = kind {
            let path = path.to_owned();
            return Err(Error::Kind { path, found });
        }
        let fault = |place: String, field: &str, message: String| Error::Field {
            path: path.to_owned(),
            place,
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
                "the name of the pods' bridge, for example cni0",
            )),
            Err(super::Error::NoPrefix) => Some((
                "detectLocal.interfaceNamePrefix",
                "what the names of the pods' interfaces begin with, for example veth",
            )),
            _ => None,
        };
        if let Some((field, what)) = lacks {
            let message = format!("this is empty, and detectLocalMode needs {what}");
            return Err(fault(String::new(), field, message));
        }
        let notes = notes(&content);
        // Each mode means nftables.
        content.settings.proxy_mode = super::ProxyMode::default();
        let settings = content.settings;
        Ok(Self { settings, notes })
    }

    /// Replaces the settings of the flags by those of the file. `--hostname-override`, `-v` and
    /// `--log-format` count for more than the file, as with kube-proxy.
    pub(crate) fn apply(&self, line: &mut CommandLine) {
        line.replace(self.settings.clone());
    }

    /// Returns what in the file has no effect, a line for each sort.
    pub(crate) fn notes(&self) -> &[String] {
        &self.notes
    }
}

/// Returns what has no effect, a line for each sort. kubeadm and kube-proxy write every field, so
/// zero and kube-proxy's default are worth none.
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
            "fields of other modes have no effect here; what there is of them is under nftables",
        ),
        (&unused, "fields that nftlet has no use for"),
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
        let message = format!("it has {size} bytes, and a configuration has at most {LARGEST}");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
    }
    fs::read_to_string(path)
}

/// Returns a text of the file without control characters, as it may be in the log.
fn in_one_line(text: &str) -> String {
    let shown = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().map(shown).collect()
}

/// Returns what is wrong, in words that need no knowledge of the library.
fn message(error: &serde_saphyr::Error) -> String {
    let error = error.without_snippet();
    match error {
        serde_saphyr::Error::MultipleDocuments { .. } => {
            return "there are several documents; leave only the configuration".to_owned();
        }
        serde_saphyr::Error::DuplicateMappingKey { key, .. } => {
            let field = key.as_deref().unwrap_or("a field");
            return format!("{field} is there twice; leave one of them");
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
    format!("this has another type; write {wanted}")
}

#[cfg(test)]
mod tests;
