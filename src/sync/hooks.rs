//! Removes foreign base chains from nftlet's tables before the lists are complete.
//!
//! A base chain that drops packets may prevent nftlet from reaching its API server, and thus from
//! getting the lists that it needs to repair the tables. Base chains with names that nftlet does not
//! use are removed without them. Other rules of an earlier process remain in force.

use super::kernel::Kernel;
use super::metrics::SyncMetrics;
use super::report::Reporter;
use crate::model::{Notice, Reason, Subject};
use crate::netlink;
use crate::nft::{Name, Op, TableFamily, TableId, Transaction};
use crate::policies;
use crate::services;

/// Whether nftlet uses a name for a base chain.
type IsOwn = fn(&Name) -> bool;

const TABLES: [(&str, IsOwn); 2] = [
    (services::TABLE, services::is_base_chain),
    (policies::TABLE, policies::is_base_chain),
];

/// Removes foreign base chains from nftlet's tables and restores the policy `accept` of nftlet's own.
/// Reports each of them. Continues with the other tables after an error.
///
/// # Errors
///
/// The last error, if the chains of a table cannot be read or one of them cannot be removed.
pub(crate) fn remove_foreign_base_chains(
    kernel: &mut impl Kernel,
    metrics: &SyncMetrics,
    reporter: &dyn Reporter,
) -> Result<(), netlink::Error> {
    let mut outcome = Ok(());
    for (name, is_own) in TABLES {
        for family in [TableFamily::Ip, TableFamily::Ip6] {
            let table = TableId::new(family, name);
            if let Err(error) = clean_table(kernel, &table, is_own, metrics, reporter) {
                outcome = Err(error);
            }
        }
    }
    outcome
}

fn clean_table(
    kernel: &mut impl Kernel,
    table: &TableId,
    is_own: IsOwn,
    metrics: &SyncMetrics,
    reporter: &dyn Reporter,
) -> Result<(), netlink::Error> {
    for found in kernel.base_chains(table)? {
        let (is_own, chain) = (is_own(&found.name), found.name);
        let (ops, done) = match found.base {
            base @ Some(_) if is_own && !found.accepts => {
                // Adding a chain that exists only changes its policy.
                let ops = vec![Op::AddChain(table.clone(), chain.clone(), base)];
                (ops, "had a policy other than accept; restored")
            }
            _ if is_own => continue,
            _ => {
                let ops = vec![
                    Op::FlushChain(table.clone(), chain.clone()),
                    Op::DeleteChain(table.clone(), chain.clone()),
                ];
                (ops, "was not created by nftlet; removed")
            }
        };
        let operations = ops.len();
        kernel.apply(&Transaction { ops })?;
        metrics.healed(operations);
        reporter.notice(&Notice {
            subject: Subject::Other(format!("table {table}").into()),
            reason: Reason::ForeignChange,
            message: format!("base chain {chain} {done}; find the process with nft monitor"),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::super::Log;
    use super::*;
    use crate::netlink::{Applied, Error, FoundBaseChain};
    use crate::nft::{Element, Ruleset};
    use crate::serve::metrics::Registry;

    /// Each table has a base chain of others; the first one that is read belongs to another process.
    #[derive(Default)]
    struct Owned {
        read: usize,
        applied: Vec<Transaction>,
    }

    impl Kernel for Owned {
        fn apply(&mut self, transaction: &Transaction) -> Result<Applied, Error> {
            self.applied.push(transaction.clone());
            Ok(Applied::default())
        }

        fn read(&mut self, _: &[&str], _: &Ruleset) -> Result<Ruleset, Error> {
            Ok(Ruleset::default())
        }

        fn base_chains(&mut self, _: &TableId) -> Result<Vec<FoundBaseChain>, Error> {
            self.read += 1;
            if self.read == 1 {
                return Err(Error::Receive {
                    what: "chains",
                    source: io::Error::from_raw_os_error(libc::EPERM),
                });
            }
            Ok(vec![FoundBaseChain {
                name: "strange".into(),
                base: None,
                accepts: true,
            }])
        }

        fn elements(&mut self, _: &TableId, _: &str) -> Result<Vec<Element>, Error> {
            Ok(Vec::new())
        }

        fn generation(&mut self) -> Result<u32, Error> {
            Ok(0)
        }
    }

    #[test]
    fn a_table_that_cannot_be_read_stops_none_of_the_others() {
        let mut kernel = Owned::default();
        let metrics = SyncMetrics::register(&Registry::new().unwrap()).unwrap();
        assert!(remove_foreign_base_chains(&mut kernel, &metrics, &Log).is_err());
        assert_eq!((kernel.read, kernel.applied.len()), (4, 3));
    }
}
