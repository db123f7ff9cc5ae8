//! What there is in the kernel by name: tables and whose they are, base chains, and objects of kinds that
//! nftlet never makes.

use std::collections::BTreeSet;
use std::fs;

use super::encode::{family, family_number};
use super::error::{Error, Owner};
use super::nftables::Nftables;
use super::read::{accepts, hooked, is_of, string_attribute};
use super::uapi;
use crate::nft::{BaseChain, Name, Stray, StrayKind, TableId};

/// A base chain in the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundBaseChain {
    /// Its name.
    pub name: Name,
    /// Its type, hook and priority; `None` for a type that nftlet never uses.
    pub base: Option<BaseChain>,
    /// Its policy is `accept`.
    pub accepts: bool,
}

impl Nftables {
    /// The tables of the families `ip` and `ip6` that have one of these names.
    ///
    /// # Errors
    ///
    /// When the dump fails or is interrupted over and over again.
    pub fn tables(&mut self, names: &[&str]) -> Result<Vec<TableId>, Error> {
        let tables = self.flagged_tables(names)?.into_iter();
        Ok(tables.map(|(id, _)| id).collect())
    }

    /// Finds the process that a table belongs to, which alone may change it.
    pub(super) fn owner(&mut self, id: &TableId) -> Result<Option<Owner>, Error> {
        let dumped = self.dump("the tables", libc::NFT_MSG_GETTABLE, 0, &[])?;
        let owner = dumped.iter().find_map(|message| {
            let attributes = message.attributes();
            let port = attributes.be32(uapi::NFTA_TABLE_OWNER);
            port.filter(|_| is_of(attributes, message, id, uapi::NFTA_TABLE_NAME))
        });
        Ok(owner.map(|port| {
            let process = fs::read_to_string(format!("/proc/{port}/comm"));
            let process = process.ok().map(|name| name.trim_end().to_owned());
            Owner { port, process }
        }))
    }

    /// The same with the flags of each.
    pub(super) fn flagged_tables(&mut self, names: &[&str]) -> Result<Vec<(TableId, u32)>, Error> {
        let dumped = self.dump("the tables", libc::NFT_MSG_GETTABLE, 0, &[])?;
        let found = dumped.iter().filter_map(|message| {
            let attributes = message.attributes();
            let name = attributes.string(uapi::NFTA_TABLE_NAME)?;
            let family = family(message.family())?;
            let flags = attributes.be32(uapi::NFTA_TABLE_FLAGS).unwrap_or_default();
            names
                .contains(&name)
                .then(|| (TableId::new(family, name), flags))
        });
        Ok(found.collect())
    }

    /// The objects of a table of kinds that nftlet does not make.
    pub(super) fn strays(&mut self, id: &TableId) -> Result<BTreeSet<Stray>, Error> {
        let mut found = BTreeSet::new();
        let of_objects = string_attribute(uapi::NFTA_OBJ_TABLE, id.name.as_str());
        let dumps = [
            ("the stateful objects", libc::NFT_MSG_GETOBJ),
            ("the flowtables", uapi::NFT_MSG_GETFLOWTABLE),
        ];
        for (what, kind) in dumps {
            // Table and name have the same attribute numbers in both messages.
            let dumped = self.dump(what, kind, family_number(id.family), &of_objects)?;
            found.extend(dumped.iter().filter_map(|message| {
                let attributes = message.attributes();
                let name = attributes.string(uapi::NFTA_OBJ_NAME)?;
                let kind = match kind {
                    libc::NFT_MSG_GETOBJ => {
                        StrayKind::Object(attributes.be32(uapi::NFTA_OBJ_TYPE)?)
                    }
                    _ => StrayKind::Flowtable,
                };
                is_of(attributes, message, id, uapi::NFTA_OBJ_TABLE).then(|| Stray {
                    kind,
                    name: Name::from(name),
                })
            }));
        }
        Ok(found)
    }

    /// The names of the chains of a table, whoever made it; none if it does not exist.
    ///
    /// # Errors
    ///
    /// When the dump fails or is interrupted over and over again.
    pub fn chain_names(&mut self, id: &TableId) -> Result<Vec<Name>, Error> {
        Ok(self.chains(id)?.into_keys().collect())
    }

    /// Returns the base chains of a table, whoever made it; none if it does not exist.
    ///
    /// # Errors
    ///
    /// When the dump fails or is interrupted over and over again.
    pub fn base_chains(&mut self, id: &TableId) -> Result<Vec<FoundBaseChain>, Error> {
        let dumped = self.dump_chains(id.family)?;
        let found = dumped.iter().filter_map(|message| {
            let attributes = message.attributes();
            let name = attributes.string(uapi::NFTA_CHAIN_NAME)?;
            attributes.nested(uapi::NFTA_CHAIN_HOOK)?;
            is_of(attributes, message, id, uapi::NFTA_CHAIN_TABLE).then(|| FoundBaseChain {
                name: Name::from(name),
                base: hooked(attributes),
                accepts: accepts(attributes),
            })
        });
        Ok(found.collect())
    }
}
