//! kube-proxy's chains in iptables, read and removed with iptables' own programs.
//!
//! A host can have rules in both variants of iptables and for both families. Each of these four is
//! examined without a program first:
//!
//! ```text
//! nft:     chains of the tables `ip nat`, ... over netlink ──┐
//! legacy:  /proc/net/ip_tables_names                         ├─ something ──> save, compare, restore
//!                                                            └─ nothing ────> done
//! ```
//!
//! So a host without iptables needs no programs, and no table is created only by looking for it.
//! Each table is changed in one step, under the lock that all users of iptables share.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::error::Error;
use super::owned::{self, IPTABLES_TABLES};
use super::program;
use super::report::{CleanupReport, counted};
use super::saved::{self, Removal};
use super::variant::{Iptables, Variant};
use crate::netlink::Nftables;
use crate::nft::{TableFamily, TableId};

/// Waits for the lock of iptables, in seconds.
const WAIT: &str = "--wait=30";
/// How often a table is read again because it changed before it was written.
const ATTEMPTS: usize = 3;

/// Removes kube-proxy's chains and the jumps to them.
pub(super) fn clean(iptables: Iptables, nftables: &mut Nftables, report: &mut CleanupReport) {
    match examine(iptables, nftables) {
        Ok(None) => {}
        Ok(Some(found)) => match Programs::find(iptables) {
            Some(programs) => {
                let kept = programs.clean(report);
                // Legacy iptables shows all chains of its tables.
                if let (Variant::Nft, Some(kept)) = (iptables.variant, kept) {
                    report_hidden(iptables.family, nftables, &kept, &programs.save, report);
                }
            }
            None => report.fail(no_programs(iptables, found)),
        },
        Err(error) => report.fail(error),
    }
}

/// Reports chains of kube-proxy that remain and are not `kept`: iptables-save shows nothing of a
/// table with rules that only `nft` can write.
fn report_hidden(
    family: TableFamily,
    nftables: &mut Nftables,
    kept: &[Kept],
    save: &Path,
    report: &mut CleanupReport,
) {
    for table in IPTABLES_TABLES {
        let id = TableId::new(family, table);
        let names = match nftables.chain_names(&id) {
            Ok(names) => names,
            Err(error) => {
                report.fail(error);
                continue;
            }
        };
        let is_kept = |name: &str| kept.iter().any(|(at, chain)| at == table && chain == name);
        let is_hidden = |name: &&str| owned::is_chain(name) && !is_kept(name);
        let names = names.iter().map(|name| name.as_str());
        let chains = names.filter(is_hidden).count();
        if chains > 0 {
            report.fail(Error::Hidden {
                chains,
                table: id,
                program: save.to_owned(),
            });
        }
    }
}

fn no_programs(iptables: Iptables, found: Leftovers) -> Error {
    let [program, _] = iptables.program_names("save");
    match found {
        Leftovers::Chains(chains) => Error::Programs {
            chains,
            iptables,
            program,
        },
        Leftovers::Tables(tables) => Error::Unseen {
            tables: tables.join(", "),
            iptables,
            program,
        },
    }
}

/// What can be seen without a program.
enum Leftovers {
    /// The number of kube-proxy's chains.
    Chains(usize),
    /// Tables whose chains only a program can list.
    Tables(Vec<String>),
}

fn examine(iptables: Iptables, nftables: &mut Nftables) -> Result<Option<Leftovers>, Error> {
    match iptables.variant {
        Variant::Nft => {
            let mut chains = 0;
            for table in IPTABLES_TABLES {
                let names = nftables.chain_names(&TableId::new(iptables.family, table))?;
                chains += names.iter().filter(|n| owned::is_chain(n.as_str())).count();
            }
            Ok((chains > 0).then_some(Leftovers::Chains(chains)))
        }
        Variant::Legacy => {
            let tables = legacy_tables(iptables.family)?;
            Ok((!tables.is_empty()).then_some(Leftovers::Tables(tables)))
        }
    }
}

/// Returns the tables of legacy iptables. The kernel creates each when it is first used.
fn legacy_tables(family: TableFamily) -> Result<Vec<String>, Error> {
    let path = Path::new(match family {
        TableFamily::Ip => "/proc/net/ip_tables_names",
        TableFamily::Ip6 => "/proc/net/ip6_tables_names",
    });
    let names = match fs::read_to_string(path) {
        Ok(names) => names,
        // The kernel has no legacy iptables, or has not loaded it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => {
            let path = path.to_owned();
            return Err(Error::Read { path, source });
        }
    };
    let mut tables: Vec<String> = names
        .lines()
        .filter(|name| IPTABLES_TABLES.contains(name))
        .map(str::to_owned)
        .collect();
    tables.sort();
    Ok(tables)
}

/// The table and the name of a chain that stays.
type Kept = (String, String);

/// The programs that print and change the rules of one of the four.
struct Programs {
    iptables: Iptables,
    save: PathBuf,
    restore: PathBuf,
}

impl Programs {
    fn find(iptables: Iptables) -> Option<Self> {
        let [own, common] = iptables.program_names("save");
        let [own_restore, common_restore] = iptables.program_names("restore");
        let pair = |save: &str, restore: &str| {
            Some(Self {
                iptables,
                save: program::find(save)?,
                restore: program::find(restore)?,
            })
        };
        pair(&own, &own_restore).or_else(|| {
            pair(&common, &common_restore)
                .filter(|programs| variant(&programs.save) == Some(iptables.variant))
        })
    }

    /// Removes kube-proxy's chains from each table. Returns the chains that stay because other
    /// rules lead to them, or `None` after a failure.
    fn clean(&self, report: &mut CleanupReport) -> Option<Vec<Kept>> {
        let mut left = ATTEMPTS;
        loop {
            left -= 1;
            let mut kept = Vec::new();
            let failed = match self.attempt(&mut kept, report) {
                Ok(failed) => failed,
                Err(error) => vec![error],
            };
            if failed.is_empty() {
                return Some(kept);
            }
            // Another process may have changed the table after it was read.
            if left == 0 || failed.iter().any(Error::is_timeout) {
                failed.into_iter().for_each(|error| report.fail(error));
                return None;
            }
        }
    }

    /// Reads all tables, and changes those with chains of kube-proxy. Returns an error for each
    /// table that could not be changed.
    fn attempt(
        &self,
        kept: &mut Vec<Kept>,
        report: &mut CleanupReport,
    ) -> Result<Vec<Error>, Error> {
        let saved = program::run(&self.save, &[], "")?;
        let mut failed = Vec::new();
        for table in saved::parse(&saved) {
            if !IPTABLES_TABLES.contains(&table.name) {
                continue;
            }
            let removal = table.removal();
            let names = removal.kept.iter();
            kept.extend(names.map(|chain| (table.name.to_owned(), chain.clone())));
            if removal.input.is_empty() {
                self.add_to_report(table.name, &removal, report);
                continue;
            }
            match program::run(&self.restore, &["--noflush", WAIT], &removal.input) {
                Ok(_) => self.add_to_report(table.name, &removal, report),
                Err(error) => failed.push(error),
            }
        }
        Ok(failed)
    }

    fn add_to_report(&self, table: &str, removal: &Removal, report: &mut CleanupReport) {
        let place = format!("{}, table {table}", self.iptables);
        if removal.chains > 0 {
            let jumps = match removal.jumps {
                0 => String::new(),
                jumps => format!(" and {}", counted(jumps, "jump")),
            };
            let chains = counted(removal.chains, "chain");
            report.removed(format!("{chains} of kube-proxy{jumps}"), place.clone());
        }
        if !removal.kept.is_empty() {
            report.note(format!(
                "{} in {place} stay, because rules of other programs jump to {} for masquerading",
                removal.kept.join(" and "),
                owned::MARK_MASQ
            ));
        }
        if removal.forward_drops {
            report.note(format!(
                "the policy of FORWARD in {place} is DROP, and {}, now removed, accepted the \
                 traffic of services; check that the network plugin accepts the traffic of pods",
                owned::FORWARD
            ));
        }
    }
}

/// Returns the variant of a program such as `iptables-save`.
fn variant(save: &Path) -> Option<Variant> {
    variant_of(&program::run(save, &["--version"], "").ok()?)
}

/// Parses `iptables-save v1.8.9 (nf_tables)`. Before 1.8 all were legacy, without parentheses.
fn variant_of(version: &str) -> Option<Variant> {
    if version.contains("(nf_tables)") {
        Some(Variant::Nft)
    } else if version.contains(" v1.") {
        Some(Variant::Legacy)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variant_of_a_program_is_in_its_version() {
        assert_eq!(
            variant_of("iptables-save v1.8.9 (nf_tables)\n"),
            Some(Variant::Nft)
        );
        assert_eq!(
            variant_of("ip6tables-save v1.8.9 (legacy)\n"),
            Some(Variant::Legacy)
        );
        assert_eq!(variant_of("iptables-save v1.4.21"), Some(Variant::Legacy));
        assert_eq!(variant_of("BusyBox"), None);
    }
}
