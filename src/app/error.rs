//! Why nftlet exits with a status other than 0.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use thiserror::Error;

use super::ask::AskError;
use super::diff::SideError;
use super::reach::FileError;
use crate::insight::reach::ReachError;
use crate::insight::{NameError, QuestionError};
use crate::netlink;
use crate::serve::http;
use crate::settings::{self, file};
use crate::source::cluster::Error as ClusterError;
use crate::source::manifests::Error as ManifestsError;

/// Why nftlet exits with a status other than 0.
#[derive(Debug, Error)]
pub(crate) enum Error {
    /// Flags or values that exclude each other.
    #[error(transparent)]
    Arguments(#[from] settings::Error),
    /// The configuration file cannot be read or is invalid.
    #[error(transparent)]
    Configuration(#[from] file::Error),
    #[error("cannot write the configuration to {}: {source}", path.display())]
    WriteConfiguration { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Netlink(#[from] netlink::Error),
    #[error(transparent)]
    Manifests(#[from] ManifestsError),
    #[error("{0}")]
    Cluster(#[source] ClusterError),
    /// A command that reads the objects once.
    #[error("cannot read the objects of {server}: {why}")]
    NotRead {
        /// The address of the API server.
        server: String,
        why: String,
    },
    /// Neither a cluster nor manifests.
    #[error("{0}; name a cluster with --kubeconfig FILE, or run without one with --manifests PATH")]
    NoSource(#[source] ClusterError),
    #[error(transparent)]
    Http(#[from] http::Error),
    #[error("cannot register the metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    #[error("cannot start {what}: {source}")]
    System {
        /// A thread, a runtime or a signal handler.
        what: &'static str,
        source: io::Error,
    },
    #[error(
        "cannot open {needed} files at once: {source}; raise the limit with ulimit -n, or with LimitNOFILE= of the systemd unit"
    )]
    Descriptors { needed: usize, source: io::Error },
    #[error("cannot read the host's routes: {0}")]
    Routes(#[source] io::Error),
    #[error(
        "Node {0} has no spec.podCIDRs, which --pod-startup=closed needs; have kube-controller-manager allocate them (--allocate-node-cidrs), or recognise pods by --detect-local-mode BridgeInterface or InterfaceNamePrefix"
    )]
    NoPodNetwork(String),
    #[error("cannot print: {0}")]
    Print(#[source] io::Error),
    /// With `--cleanup`.
    #[error("not everything was removed; the messages above give the reasons")]
    NotCleaned,
    /// With `--once`.
    #[error("the rules were not written; the messages above give the reason")]
    NotProgrammed,
    /// With `--once`: a signal arrived first.
    #[error("stopped before the rules were written; the rules in the kernel did not change")]
    Interrupted,
    /// A question that cannot be understood.
    #[error(transparent)]
    Question(#[from] QuestionError),
    /// A name in a question that is unknown.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The running agent gives no answer.
    #[error(transparent)]
    Ask(#[from] AskError),
    #[error("cannot read the questions in {}: {source}; name a file, or - for standard input", path.display())]
    Batch { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Reach(#[from] ReachError),
    /// A file of expectations.
    #[error(transparent)]
    Expectations(#[from] FileError),
    /// Sides that cannot be compared.
    #[error(transparent)]
    Sides(#[from] SideError),
    #[error("the source of objects ended unexpectedly; the rules stay in force")]
    SourceEnded,
}

impl Error {
    /// Returns 2 for an invalid command line or configuration, and 1 for everything else.
    pub(super) fn exit_code(&self) -> ExitCode {
        match self {
            Self::Arguments(_)
            | Self::Configuration(_)
            | Self::Question(_)
            | Self::Expectations(_)
            | Self::Sides(SideError::Twice(_) | SideError::Manifests)
            | Self::Reach(ReachError::Port(_) | ReachError::ExposedPage) => ExitCode::from(2),
            _ => ExitCode::FAILURE,
        }
    }
}

/// Returns a function that adds to an error what could not be started.
pub(super) fn system(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::System { what, source }
}
