//! The interface to the kernel.

use crate::netlink::{Applied, Error, FoundBaseChain, Nftables};
use crate::nft::{Element, Ruleset, TableId, Transaction};

/// Writes and reads rules.
pub trait Kernel {
    /// Writes a transaction, all or nothing.
    ///
    /// # Errors
    ///
    /// When the kernel refuses operations, or the transaction cannot be sent.
    fn apply(&mut self, transaction: &Transaction) -> Result<Applied, Error>;

    /// Reads the tables of the given names; see [`Nftables::read`].
    ///
    /// # Errors
    ///
    /// When the tables cannot be read.
    fn read(&mut self, names: &[&str], wanted: &Ruleset) -> Result<Ruleset, Error>;

    /// Reads the base chains of a table. Only fake kernels use this default; verdicts of chains do
    /// not matter to them.
    ///
    /// # Errors
    ///
    /// When the chains cannot be read.
    fn base_chains(&mut self, table: &TableId) -> Result<Vec<FoundBaseChain>, Error> {
        let mut found = self.read(&[table.name.as_str()], &Ruleset::default())?;
        let chains = found.tables.remove(table).unwrap_or_default().chains;
        let hooked = chains.into_iter().filter_map(|(name, chain)| {
            let base = Some(chain.base?);
            Some(FoundBaseChain {
                name,
                base,
                accepts: true,
            })
        });
        Ok(hooked.collect())
    }

    /// Reads the elements of a set that packets fill.
    ///
    /// # Errors
    ///
    /// When the set cannot be read.
    fn elements(&mut self, table: &TableId, set: &str) -> Result<Vec<Element>, Error>;

    /// Returns the generation of the ruleset, to which every commit adds one; see
    /// [`Nftables::generation`].
    ///
    /// # Errors
    ///
    /// When the kernel does not answer.
    fn generation(&mut self) -> Result<u32, Error>;
}

impl Kernel for Nftables {
    fn apply(&mut self, transaction: &Transaction) -> Result<Applied, Error> {
        Nftables::apply(self, transaction)
    }

    fn read(&mut self, names: &[&str], wanted: &Ruleset) -> Result<Ruleset, Error> {
        Nftables::read(self, names, wanted)
    }

    fn base_chains(&mut self, table: &TableId) -> Result<Vec<FoundBaseChain>, Error> {
        Nftables::base_chains(self, table)
    }

    fn elements(&mut self, table: &TableId, set: &str) -> Result<Vec<Element>, Error> {
        Nftables::elements(self, table, set)
    }

    fn generation(&mut self) -> Result<u32, Error> {
        Nftables::generation(self)
    }
}
