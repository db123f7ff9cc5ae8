//! Removal of rules: nftlet's own, and what kube-proxy leaves behind when it is replaced.
//!
//! ```text
//!                    All   Own   KubeProxy   Superseded
//!  nftables: nftlet   x     x                              tables of nftlet
//!  nftables           x              x           x         tables of kube-proxy
//!  iptables, saved    x              x           x         chains, and the jumps to them
//!  ipvs               x              x                     interface, virtual services, ipsets
//! ```
//!
//! [`clean`] removes these one by one, and adds each failure to the [`CleanupReport`]. Existing
//! connections continue, since conntrack translates them without the rules. Connections through
//! ipvs would break, since ipvs forwards each packet; [`CleanupScope::Superseded`], which a starting
//! nftlet uses, therefore leaves ipvs alone.
//!
//! Tables are removed by name over netlink, chains of iptables by name with iptables' own programs;
//! `owned` has the names. Rules of other programs are not changed.

mod error;
mod iptables;
mod ipvs;
mod owned;
mod program;
mod report;
mod saved;
mod variant;

use std::thread;
use std::time::{Duration, Instant};

use rustix::thread::{MembarrierCommand, membarrier};

use crate::netlink::{self, Nftables};
use crate::nft::{Op, TableId, Transaction};
use crate::policies;
use crate::services;

use self::error::Error;
pub(crate) use self::report::CleanupReport;
use self::variant::Iptables;

/// The names of the tables that nftlet writes, in both families.
const OWN_TABLES: [&str; 2] = [services::TABLE, policies::TABLE];
/// How long an nftlet that still runs takes to restore its tables at most. It reacts to the first
/// change at once, but needs some tenths of a second for a large table on a busy node.
const RESTORE_TIME: Duration = Duration::from_secs(1);
const CHECK_EVERY: Duration = Duration::from_millis(50);
/// Longer than a packet takes to traverse the rules, even on a machine that stalls.
const TRAVERSAL_TIME: Duration = Duration::from_millis(100);

/// What to remove.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CleanupScope {
    /// All that nftlet and kube-proxy wrote.
    All,
    /// nftlet's rules.
    Own,
    /// What kube-proxy wrote.
    KubeProxy,
    /// What kube-proxy wrote, except what existing connections need.
    Superseded,
}

/// Removes rules in the network namespace of the calling thread. Blocks.
///
/// # Errors
///
/// If nftables cannot be opened, usually without `CAP_NET_ADMIN`. All other failures are in the
/// report.
pub(crate) fn clean(scope: CleanupScope) -> Result<CleanupReport, netlink::Error> {
    let mut nftables = Nftables::open()?;
    let mut report = CleanupReport::default();
    let own = match scope {
        CleanupScope::All | CleanupScope::Own => nftables.tables(&OWN_TABLES)?,
        CleanupScope::KubeProxy | CleanupScope::Superseded => Vec::new(),
    };
    let removed = Instant::now();
    remove_tables(&mut nftables, &own, &mut report);
    if scope != CleanupScope::Own {
        let tables = nftables.tables(&[owned::KUBE_PROXY_TABLE])?;
        remove_tables(&mut nftables, &tables, &mut report);
        for iptables in Iptables::ALL {
            iptables::clean(iptables, &mut nftables, &mut report);
        }
    }
    match scope {
        CleanupScope::All | CleanupScope::KubeProxy => ipvs::clean(&mut report),
        CleanupScope::Superseded => match ipvs::is_present() {
            Ok(true) => report.note(
                "what kube-proxy's ipvs mode left outside of iptables stays, because existing \
                 connections go through it; remove it later with nftlet --cleanup=kube-proxy"
                    .into(),
            ),
            Ok(false) => {}
            Err(error) => report.fail(error),
        },
        CleanupScope::Own => {}
    }
    if !own.is_empty() {
        check_not_restored(&mut nftables, removed, &mut report)?;
    }
    Ok(report)
}

fn remove_tables(nftables: &mut Nftables, tables: &[TableId], report: &mut CleanupReport) {
    for table in tables {
        match remove_table(nftables, table) {
            Ok(()) => report.removed(format!("table {table}"), "nftables"),
            // Another process has removed it.
            Err(error) if error.errno() == Some(libc::ENOENT) => {}
            Err(error) => report.fail(error),
        }
    }
}

/// Removes a table without dropping packets that traverse it.
///
/// A packet traverses the rules that existed when it entered, but a lookup does not find elements
/// that were removed since: the packet would be dropped or rejected. So the base chains are removed
/// first, and the rest when the packets inside have left.
fn remove_table(nftables: &mut Nftables, table: &TableId) -> Result<(), netlink::Error> {
    let base_chains = nftables.base_chains(table)?;
    let names = || base_chains.iter().map(|chain| chain.name.clone());
    let flush = names().map(|chain| Op::FlushChain(table.clone(), chain));
    let delete = names().map(|chain| Op::DeleteChain(table.clone(), chain));
    nftables.apply(&Transaction {
        ops: flush.chain(delete).collect(),
    })?;
    wait_for_packets();
    nftables.apply(&Transaction {
        ops: vec![Op::DeleteTable(table.clone())],
    })?;
    Ok(())
}

/// Waits until every packet that traverses the rules now has left them.
fn wait_for_packets() {
    // This waits for all RCU critical sections, in which packets traverse the rules. Kernels with
    // nohz_full refuse it; there, a pause has to do.
    if membarrier(MembarrierCommand::Global).is_err() {
        thread::sleep(TRAVERSAL_TIME);
    }
}

/// Reports an nftlet that still runs and restores the tables.
fn check_not_restored(
    nftables: &mut Nftables,
    removed: Instant,
    report: &mut CleanupReport,
) -> Result<(), netlink::Error> {
    loop {
        if let Some(table) = nftables.tables(&OWN_TABLES)?.into_iter().next() {
            report.fail(Error::WrittenAgain { table });
            return Ok(());
        }
        if removed.elapsed() > RESTORE_TIME {
            return Ok(());
        }
        thread::sleep(CHECK_EVERY);
    }
}
