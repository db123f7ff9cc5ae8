//! The configuration file of kube-proxy, `KubeProxyConfiguration` (kubeproxy.config.k8s.io/v1alpha1).
//!
//! ```text
//! file ─> wire (fields with places) ─> File::apply ─> Settings, as if flags had said it
//!    │          └─> notes (what is in it and has no effect)
//!    └─> follow (a change that can be used ends the process)
//!
//! Settings ─> effective: a complete KubeProxyConfiguration, for --write-config-to and /configz
//! ```
//!
//! A zero value, an empty text and null mean the default, as with kube-proxy. Under `conntrack`
//! only null does: zero leaves the kernel's value. What cannot be used is one line with the place
//! and the name of the field.

mod effective;
mod follow;
mod notes;
mod wire;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use thiserror::Error;

pub use self::effective::{GROUP, effective};
pub use self::follow::{Ended, follow};
use self::wire::Wire;
use crate::settings::{CommandLine, DetectLocalMode, LogFormat, Verbose, verbosity_of};

/// The largest file that is read: ConfigMaps have at most 1 MiB.
const LARGEST: u64 = 1 << 20;

/// Why a configuration file cannot be used.
#[derive(Debug, Error)]
pub enum Error {
    /// It cannot be read.
    #[error("cannot read the configuration {}: {source}; name a file that nftlet may read with --config", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is no such configuration.
    #[error("{}: this is {found}; --config wants a KubeProxyConfiguration of {VERSION}", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
        /// What it says it is.
        found: String,
    },
    /// It is not YAML, or a field cannot be used.
    #[error("{}{place}: {field}{message}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// `:line:column`, where it is known.
        place: String,
        /// The path of the field with a colon, where it is known.
        field: String,
        /// What is wrong, and what to write.
        message: String,
    },
    /// The changes of the file cannot be followed.
    #[error("cannot follow the changes of {}: {source}; raise the sysctl fs.inotify.max_user_instances", path.display())]
    Follow {
        /// The file.
        path: PathBuf,
        /// What inotify said.
        source: notify::Error,
    },
}

/// The version that is understood.
const VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
const KIND: &str = "KubeProxyConfiguration";

/// A configuration file that can be used.
#[derive(Clone, Debug, PartialEq)]
pub struct File {
    wire: Wire,
    unknown: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Header {
    api_version: Option<String>,
    kind: Option<String>,
}

impl File {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// Everything that keeps it from being used, the first fault that is found.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let text = read(path).map_err(|source| Error::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(path, &text)
    }

    /// Understands the text of a file; `path` is for messages.
    fn parse(path: &Path, text: &str) -> Result<Self, Error> {
        let header = decode::<Header>(path, text, &mut |_| {})?;
        let named = |name: Option<String>| name.filter(|name| !name.is_empty());
        let found = match (named(header.api_version), named(header.kind)) {
            (Some(version), Some(kind)) if version == VERSION && kind == KIND => None,
            (Some(version), Some(kind)) => Some(in_one_line(&format!("a {kind} of {version}"))),
            (None, _) => Some("an object without apiVersion".to_owned()),
            (_, None) => Some("an object without kind".to_owned()),
        };
        if let Some(found) = found {
            let path = path.to_owned();
            return Err(Error::Kind { path, found });
        }
        let mut unknown = Vec::new();
        let wire = decode::<Wire>(path, text, &mut |field| unknown.push(field))?;
        let needed = |field: &str, what: &str| Error::Field {
            path: path.to_owned(),
            place: String::new(),
            field: format!("{field}: "),
            message: format!("this is empty, and detectLocalMode needs {what}"),
        };
        let detect = &wire.detect_local;
        let lacks = |name: &Option<_>| name.is_none();
        match wire.detect_local_mode.unwrap_or_default() {
            DetectLocalMode::BridgeInterface if lacks(&detect.bridge_interface) => Err(needed(
                "detectLocal.bridgeInterface",
                "the name of the pods' bridge, for example cni0",
            )),
            DetectLocalMode::InterfaceNamePrefix if lacks(&detect.interface_name_prefix) => {
                Err(needed(
                    "detectLocal.interfaceNamePrefix",
                    "what the names of the pods' interfaces begin with, for example veth",
                ))
            }
            _ => Ok(Self { wire, unknown }),
        }
    }

    /// Puts the settings of the file in the place of those of the flags. `--hostname-override`,
    /// `-v` and `--log-format` count for more than the file, as with kube-proxy.
    pub fn apply(&self, line: &mut CommandLine) {
        let wire = &self.wire;
        let name_given = line.is_given("hostname_override");
        let format_given = line.is_given("log_format");
        let verbosity_given = line.is_given("verbose");
        let args = &mut line.args;
        if !name_given {
            args.hostname_override = wire.hostname_override.clone().map(|name| name.0);
        }
        if !format_given {
            args.log_format = wire.logging.format.unwrap_or(LogFormat::Text);
        }
        if !verbosity_given {
            let level = wire.logging.verbosity.map(|level| verbosity_of(level.0));
            let level = level.filter(|level| *level > 0);
            args.verbose = level.map(Verbose::Level).into_iter().collect();
        }
        args.kubeconfig = wire.client_connection.kubeconfig.clone();
        args.cluster_cidr = wire.cluster_cidr.clone().unwrap_or_default();
        args.detect_local_mode = wire.detect_local_mode.unwrap_or_default();
        args.pod_bridge_interface = wire.detect_local.bridge_interface.clone();
        args.pod_interface_name_prefix = wire.detect_local.interface_name_prefix.clone();
        args.nodeport_addresses = vec![wire.node_port_addresses.clone().unwrap_or_default().0];
        args.masquerade_all = wire.nftables.masquerade_all.is_some_and(|all| all.0);
        args.masquerade_bit = wire.nftables.masquerade_bit.map_or(14, |bit| bit.0);
        args.sync_period = wire.nftables.sync_period.and_then(|period| period.set());
        args.bind_address = wire.bind_address;
        args.bind_address_hard_fail = wire.bind_address_hard_fail.is_some_and(|hard| hard.0);
        args.metrics_bind_address = wire.metrics_bind_address;
        args.healthz_bind_address = wire.healthz_bind_address;
        (args.healthz_port, args.metrics_port) = (None, None);
        args.process.oom_score_adj = wire.oom_score_adj.map(|score| score.0);
        let (asked, flags) = (&wire.conntrack, &mut args.conntrack);
        flags.conntrack_max_per_core = asked.max_per_core.map(|number| number.0);
        flags.conntrack_min = asked.min.map_or(131_072, |number| number.0);
        let period = |duration: Option<wire::Period>| duration.map(|duration| duration.0);
        let set = |duration: Option<wire::Period>| duration.and_then(wire::Period::set);
        flags.conntrack_tcp_timeout_established = period(asked.tcp_established_timeout);
        flags.conntrack_tcp_timeout_close_wait = period(asked.tcp_close_wait_timeout);
        flags.conntrack_tcp_be_liberal = asked.tcp_be_liberal.is_some_and(|liberal| liberal.0);
        flags.conntrack_udp_timeout = set(asked.udp_timeout);
        flags.conntrack_udp_timeout_stream = set(asked.udp_stream_timeout);
    }

    /// What the file says without effect, a line for each sort.
    pub fn notes(&self) -> Vec<String> {
        notes::notes(&self.wire, &self.unknown)
    }
}

fn read(path: &Path) -> io::Result<String> {
    let size = fs::metadata(path)?.len();
    if size > LARGEST {
        let message = format!("it has {size} bytes, and a configuration has at most {LARGEST}");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
    }
    fs::read_to_string(path)
}

/// Decodes a text; `ignored` is told the paths of fields that the type does not have.
fn decode<'de, T: Deserialize<'de>>(
    path: &Path,
    text: &'de str,
    ignored: &mut dyn FnMut(String),
) -> Result<T, Error> {
    let mut track = serde_path_to_error::Track::new();
    let decoded = serde_saphyr::with_deserializer_from_str(text, |yaml| {
        let tracked = serde_path_to_error::Deserializer::new(yaml, &mut track);
        serde_ignored::deserialize(tracked, |field| ignored(plain(&field.to_string())))
    });
    decoded.map_err(|error| {
        let place = error.location();
        let place = place.map_or(String::new(), |at| {
            format!(":{}:{}", at.line(), at.column())
        });
        let field = plain(&track.path().to_string());
        Error::Field {
            path: path.to_owned(),
            place,
            field: match field.as_str() {
                "" | "." | "?" => String::new(),
                field => format!("{field}: "),
            },
            message: message(&error),
        }
    })
}

/// A path without the marks of optional values.
fn plain(path: &str) -> String {
    in_one_line(&path.replace(".?", ""))
}

/// Text of the file as it may be in the log.
fn in_one_line(text: &str) -> String {
    let shown = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().map(shown).collect()
}

/// What is wrong, in words for someone who does not know the library.
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
