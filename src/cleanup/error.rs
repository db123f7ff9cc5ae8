//! What keeps something from being removed.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;

use thiserror::Error;

use super::iptables::Iptables;
use crate::netlink;
use crate::nft::TableId;

/// Why something stays that should have gone.
#[derive(Debug, Error)]
pub enum Error {
    /// The kernel refused, or cannot be spoken to.
    #[error(transparent)]
    Netlink(#[from] netlink::Error),
    /// A file that tells what there is cannot be read.
    #[error("cannot read {}: {source}; nftlet needs the capability CAP_NET_ADMIN (run it as root)", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// There are chains, and nobody to remove them.
    #[error(
        "{chains} chains of kube-proxy stay in {iptables}, because there is no program {program}; install iptables, or run kube-proxy --cleanup"
    )]
    Programs {
        /// How many chains.
        chains: usize,
        /// Where they are.
        iptables: Iptables,
        /// What is missing.
        program: String,
    },
    /// There are tables that nobody can look into.
    #[error(
        "{iptables} has tables ({tables}) that cannot be looked into without the program {program}; if kube-proxy has chains there, they stay; install iptables, or run kube-proxy --cleanup"
    )]
    Unseen {
        /// Their names.
        tables: String,
        /// Where they are.
        iptables: Iptables,
        /// What is missing.
        program: String,
    },
    /// There are chains that iptables does not show.
    #[error(
        "{chains} chains of kube-proxy stay in table {table}, because {} does not show them: the table has rules that only nft can write; remove those rules (nft -a list table {table}) and clean up again, or reboot the node", program.display()
    )]
    Hidden {
        /// How many chains.
        chains: usize,
        /// Where they are.
        table: TableId,
        /// What should have shown them.
        program: PathBuf,
    },
    /// A program does not end.
    #[error("{} did not end within {seconds} s and was killed; another program may hold the lock of iptables", program.display())]
    Timeout {
        /// The program.
        program: PathBuf,
        /// How long it was waited for.
        seconds: u64,
    },
    /// A program cannot be run.
    #[error("cannot run {}: {source}", program.display())]
    Run {
        /// The program.
        program: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A program was run and did not do its work.
    #[error("{} failed ({status}): {said}; its table was left as it was", program.display())]
    Failed {
        /// The program.
        program: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// What it said, in one line.
        said: String,
    },
    /// Virtual services of ipvs, and nobody to remove them.
    #[error(
        "{services} virtual services of kube-proxy stay in ipvs, because there is no program ipvsadm; install it, or run kube-proxy --cleanup"
    )]
    Ipvsadm {
        /// How many.
        services: usize,
    },
    /// Somebody wrote a table again that had just been removed.
    #[error("table {table} came back: an nftlet is still running on this node; stop it first")]
    CameBack {
        /// The table.
        table: TableId,
    },
}

impl Error {
    /// Whether a program did not end.
    pub(super) fn is_timeout(&self) -> bool {
        matches!(self, Self::Timeout { .. })
    }
}
