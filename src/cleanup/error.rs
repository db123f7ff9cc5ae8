//! Why something could not be removed.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;

use thiserror::Error;

use super::variant::Iptables;
use crate::netlink;
use crate::nft::TableId;

/// Why something could not be removed.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Netlink(#[from] netlink::Error),
    #[error("cannot read {}: {source}; nftlet needs the capability CAP_NET_ADMIN (run it as root)", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error(
        "{chains} chains of kube-proxy stay in {iptables}, because there is no program {program}; install iptables, or run kube-proxy --cleanup"
    )]
    Programs {
        chains: usize,
        iptables: Iptables,
        program: String,
    },
    #[error(
        "{iptables} has tables ({tables}) whose chains cannot be listed without the program {program}; chains of kube-proxy in them stay; install iptables, or run kube-proxy --cleanup"
    )]
    Unseen {
        tables: String,
        iptables: Iptables,
        program: String,
    },
    /// iptables does not show the chains.
    #[error(
        "{chains} chains of kube-proxy stay in table {table}, because {} does not show them: the table has rules that only nft can write; remove those rules (nft -a list table {table}) and clean up again, or reboot the node", program.display()
    )]
    Hidden {
        chains: usize,
        table: TableId,
        program: PathBuf,
    },
    #[error("{} did not end within {seconds} s and was killed; another program may hold the lock of iptables", program.display())]
    Timeout { program: PathBuf, seconds: u64 },
    #[error("cannot run {}: {source}", program.display())]
    Run { program: PathBuf, source: io::Error },
    #[error("{} failed ({status}): {message}; its table did not change", program.display())]
    Failed {
        program: PathBuf,
        status: ExitStatus,
        /// Its standard error, in one line.
        message: String,
    },
    #[error(
        "{services} virtual services of kube-proxy stay in ipvs, because there is no program ipvsadm; install it, or run kube-proxy --cleanup"
    )]
    Ipvsadm { services: usize },
    /// The table was removed, and exists again.
    #[error(
        "table {table} was written again: an nftlet is still running on this node; stop it first"
    )]
    WrittenAgain { table: TableId },
}

impl Error {
    pub(super) fn is_timeout(&self) -> bool {
        matches!(self, Self::Timeout { .. })
    }
}
