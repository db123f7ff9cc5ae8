//! Removes base chains of others from nftlet's tables while it is not known yet what the tables
//! are to hold.
//!
//! A base chain that drops packets may keep nftlet from its API server, and with it from the lists
//! by which the tables are compared and repaired. So base chains of names that nftlet does not use
//! are removed without any list. All else that an earlier run left stays in force.

use super::{Kernel, Reporter};
use crate::model::{Notice, Reason, Subject};
use crate::netlink;
use crate::nft::{Family, Name, Op, TableId, Transaction};
use crate::policies;
use crate::serve::metrics::Metrics;
use crate::services;

/// Whether nftlet gives a name to a base chain.
type IsOwn = fn(&Name) -> bool;

const TABLES: [(&str, IsOwn); 2] = [
    (services::TABLE, services::is_base_chain),
    (policies::TABLE, policies::is_base_chain),
];

/// Removes the base chains in nftlet's tables that nftlet does not make, and lets those of its own
/// accept again what meets no verdict. Reports each of them. A table that cannot be read or changed
/// stops none of the others.
///
/// # Errors
///
/// The last error, when the chains of a table cannot be read or one of them cannot be removed.
pub fn remove_foreign_hooks(
    kernel: &mut impl Kernel,
    metrics: &Metrics,
    reporter: &dyn Reporter,
) -> Result<(), netlink::Error> {
    let mut outcome = Ok(());
    for (name, is_own) in TABLES {
        for family in [Family::Ip, Family::Ip6] {
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
    metrics: &Metrics,
    reporter: &dyn Reporter,
) -> Result<(), netlink::Error> {
    for found in kernel.base_chains(table)? {
        let (is_own, chain) = (is_own(&found.name), found.name);
        let (ops, done) = match found.base {
            base @ Some(_) if is_own && !found.accepts => {
                // The policy is all that this changes of a chain that exists.
                let ops = vec![Op::AddChain(table.clone(), chain.clone(), base)];
                (ops, "had another policy than accept, which was put back")
            }
            _ if is_own => continue,
            _ => {
                let ops = vec![
                    Op::FlushChain(table.clone(), chain.clone()),
                    Op::DeleteChain(table.clone(), chain.clone()),
                ];
                (ops, "was not made by nftlet and has been removed")
            }
        };
        let operations = ops.len();
        kernel.apply(&Transaction { ops })?;
        metrics.healed(operations);
        metrics.notice(Reason::ForeignChange.as_str());
        reporter.notice(&Notice {
            subject: Subject::Other(format!("table {table}").into()),
            reason: Reason::ForeignChange,
            message: format!("the base chain {chain} {done} (find out who: nft monitor)"),
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
        let metrics = Metrics::new().expect("metrics have different names");
        assert!(remove_foreign_hooks(&mut kernel, &metrics, &Log).is_err());
        assert_eq!((kernel.read, kernel.applied.len()), (4, 3));
    }
}
