//! Removes base chains of others from nftlet's tables while it is not known yet what the tables
//! are to hold.
//!
//! A base chain that drops packets may keep nftlet from its API server, and with it from the lists
//! by which the tables are compared and repaired. So base chains of names that nftlet does not use
//! are removed without any list. All else that an earlier run left stays in force.

use super::{Kernel, Reconciler, Reporter};
use crate::compile;
use crate::metrics::Metrics;
use crate::model::{Notice, Reason, Subject};
use crate::netlink;
use crate::policy;
use crate::ruleset::{Family, Name, Op, TableId, Transaction};

/// Whether nftlet gives a name to a base chain.
type IsOwn = fn(&Name) -> bool;

const TABLES: [(&str, IsOwn); 2] = [
    (compile::TABLE, compile::is_base_chain),
    (policy::TABLE, policy::is_base_chain),
];

/// Removes the base chains in nftlet's tables that nftlet does not make, and lets those of its own
/// accept again what meets no verdict. Reports each of them.
///
/// # Errors
///
/// When the chains cannot be read, or one of them cannot be removed.
pub fn remove_foreign_hooks(
    kernel: &mut impl Kernel,
    metrics: &Metrics,
    reporter: &dyn Reporter,
) -> Result<(), netlink::Error> {
    for (name, is_own) in TABLES {
        for family in [Family::Ip, Family::Ip6] {
            let table = TableId::new(family, name);
            for found in kernel.base_chains(&table)? {
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
        }
    }
    Ok(())
}

impl<K: Kernel> Reconciler<'_, K> {
    /// Does the same for the kernel that rules are written to; a failure is reported.
    pub(super) fn remove_foreign_hooks(&mut self) {
        let removed = remove_foreign_hooks(&mut self.kernel, self.metrics, self.reporter);
        if let Err(error) = removed {
            self.metrics.failure();
            self.reporter.failed(&error);
        }
    }
}
