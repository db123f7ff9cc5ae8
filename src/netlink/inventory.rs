//! Lists tables and their owners, base chains, and objects of kinds that nftlet never creates.

use std::collections::BTreeSet;
use std::fs;

use super::error::{Error, Owner};
use super::message::{family, family_number};
use super::nftables::Nftables;
use super::read::{accepts, hooked, is_of, string_attribute};
use super::uapi;
use crate::nft::{BaseChain, Name, Stray, StrayKind, TableId};

/// A base chain in the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundBaseChain {
    pub name: Name,
    /// Its type, hook and priority; `None` if nftlet never uses the type.
    pub base: Option<BaseChain>,
    /// Whether its policy is `accept`.
    pub accepts: bool,
}

impl Nftables {
    /// Returns the tables with one of these names in the families `ip` and `ip6`.
    ///
    /// # Errors
    ///
    /// When the dump fails or every attempt is interrupted.
    pub(crate) fn tables(&mut self, names: &[&str]) -> Result<Vec<TableId>, Error> {
        let tables = self.flagged_tables(names)?.into_iter();
        Ok(tables.map(|(id, _)| id).collect())
    }

    /// Returns the process that owns a table, if the table has an owner.
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

    /// Like [`Nftables::tables`], with the flags of each table.
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

    /// Returns the stateful objects and flowtables of a table, neither of which nftlet creates.
    pub(super) fn strays(&mut self, id: &TableId) -> Result<BTreeSet<Stray>, Error> {
        let mut found = BTreeSet::new();
        let of_objects = string_attribute(uapi::NFTA_OBJ_TABLE, id.name.as_str());
        let dumps = [
            ("the stateful objects", libc::NFT_MSG_GETOBJ),
            ("the flowtables", uapi::NFT_MSG_GETFLOWTABLE),
        ];
        for (what, kind) in dumps {
            // Table and name have the same attribute numbers in both kinds of messages.
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

    /// Returns the names of the chains of any table; none if it does not exist.
    ///
    /// # Errors
    ///
    /// When the dump fails or every attempt is interrupted.
    pub(crate) fn chain_names(&mut self, id: &TableId) -> Result<Vec<Name>, Error> {
        Ok(self.chains(id)?.into_keys().collect())
    }

    /// Returns the base chains of any table; none if it does not exist.
    ///
    /// # Errors
    ///
    /// When the dump fails or every attempt is interrupted.
    pub(crate) fn base_chains(&mut self, id: &TableId) -> Result<Vec<FoundBaseChain>, Error> {
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
