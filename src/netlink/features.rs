//! Asks the kernel for the features that rules use.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::encode::encode;
use super::error::{Error, MissingFeature};
use super::message::{AttrWriter, begin_message, end_message, family_number};
use super::nftables::Nftables;
use super::uapi;
use crate::nft::{
    BaseChain, ChainKind, CtState, Declaration, Hook, Name, Op, RejectWith, Rule, Selector,
    SetKind, Statement, TableFamily, TableId, Transaction,
};

/// A table with this flag has no hooks.
const NFT_TABLE_F_DORMANT: u32 = 1;
/// The module of what is in no other one.
const CORE: &str = "nf_tables";
const FAMILIES: [TableFamily; 2] = [TableFamily::Ip, TableFamily::Ip6];

/// What rules are for.
#[derive(Clone, Copy, Debug)]
pub struct Needs {
    pub services: bool,
    pub policies: bool,
}

/// An operation that uses one feature.
#[derive(Clone)]
struct Attempt {
    feature: &'static str,
    /// The kernel module that has it.
    module: &'static str,
    op: Op,
}

/// Returns the attempts at all features of a family, in the order in which they depend on each other.
fn attempts(family: TableFamily, needs: Needs) -> Vec<Attempt> {
    let table = table(family);
    let chain = Name::from("rules");
    let of_family = |ipv4, ipv6| match family {
        TableFamily::Ip => ipv4,
        TableFamily::Ip6 => ipv6,
    };
    let add_chain = |feature, module, name: &str, base| Attempt {
        feature,
        module,
        op: Op::AddChain(table.clone(), name.into(), base),
    };
    let set = |feature, module, name: &str, declaration| Attempt {
        feature,
        module,
        op: Op::AddSet(table.clone(), name.into(), Arc::new(declaration)),
    };
    let rule = |feature, module, statement: Statement| Attempt {
        feature,
        module,
        op: Op::AddRule(table.clone(), chain.clone(), Rule::new([statement])),
    };
    let address = [Selector::DestinationAddress];
    let ranges = Declaration {
        interval: true,
        ..Declaration::new(SetKind::Set, address)
    };
    let is_new = Statement::CtState(CtState::New.into());
    let fib = of_family("nft_fib_ipv4", "nft_fib_ipv6");
    let reject = of_family("nft_reject_ipv4", "nft_reject_ipv6");
    let unreachable = Statement::Reject(RejectWith::PortUnreachable);
    let mut attempts = vec![
        add_chain("chains", CORE, "rules", None),
        set("sets of ranges", CORE, "ranges", ranges),
        rule("states of connections", "nft_ct", is_new),
        rule("types of addresses", fib, Statement::DestinationIsLocal),
        rule("rejections", reject, unreachable),
    ];
    if needs.services {
        let base = BaseChain {
            kind: ChainKind::Nat,
            hook: Hook::Prerouting,
            priority: 0,
        };
        let endpoint = [Selector::DestinationAddress, Selector::DestinationPort];
        let clients = Declaration {
            timeout: Some(Duration::from_secs(1)),
            size: Some(1),
            ..Declaration::new(SetKind::Map(endpoint.into()), address)
        };
        let dnat = Statement::DnatByMap(address.into(), "clients".into());
        attempts.extend([
            set("maps that rules fill", CORE, "clients", clients),
            add_chain(
                "chains that translate",
                "nft_chain_nat",
                "translation",
                Some(base),
            ),
            rule("translation", "nft_nat", dnat),
            rule("masquerading", "nft_masq", Statement::Masquerade),
            rule("random numbers", "nft_numgen", Statement::RandomPriority(1)),
        ]);
    }
    if needs.policies {
        let counted = Declaration {
            counter: true,
            ..Declaration::new(SetKind::Set, address)
        };
        let limit = Statement::Limit {
            per_second: 1,
            burst: 1,
        };
        attempts.extend([
            set(
                "counters of set elements (before Linux 5.17 also module nft_counter)",
                CORE,
                "counted",
                counted,
            ),
            rule("limits", "nft_limit", limit),
        ]);
    }
    attempts
}

/// Returns the kernel modules that services and policies use. Some are part of others, or of the
/// kernel.
pub fn modules() -> BTreeSet<&'static str> {
    let needs = Needs {
        services: true,
        policies: true,
    };
    let attempts = FAMILIES
        .into_iter()
        .flat_map(|family| attempts(family, needs));
    let features = attempts.map(|attempt| attempt.module);
    let others = ["nf_conntrack_netlink", "nft_counter"];
    features.chain(others).collect()
}

impl Nftables {
    /// Has the kernel load the modules that rules need, and checks that it has them.
    ///
    /// Sends each feature once, in a transaction that is not committed because it has no end: the
    /// kernel loads modules and reports errors as for any other. The tables are dormant, so that their
    /// base chains have no effect either.
    ///
    /// # Errors
    ///
    /// [`Error::MissingFeatures`] names the features that the kernel refused; [`Error::Send`] or
    /// [`Error::Receive`] when it does not answer.
    pub fn require(&mut self, needs: Needs) -> Result<(), Error> {
        let attempts: Vec<Attempt> = FAMILIES
            .into_iter()
            .flat_map(|family| attempts(family, needs))
            .collect();
        self.load_modules(&attempts)?;
        let missing = self.missing(&attempts)?;
        if missing.is_empty() {
            return Ok(());
        }
        Err(Error::MissingFeatures { missing })
    }

    /// Sends each feature whose module is not loaded by itself. Whenever the kernel has loaded a
    /// module, it begins the transaction again and requests all earlier modules once more, so that
    /// one transaction with everything runs `modprobe` a hundred times.
    fn load_modules(&mut self, attempts: &[Attempt]) -> Result<(), Error> {
        let is_loaded = |module: &str| Path::new("/sys/module").join(module).exists();
        // What is part of the kernel has no such directory; then the others usually are, too.
        if !is_loaded(CORE) {
            return Ok(());
        }
        let (core, modules): (Vec<_>, Vec<_>) =
            attempts.iter().partition(|attempt| attempt.module == CORE);
        for attempt in modules {
            if !is_loaded(attempt.module) {
                let few = core.iter().copied().chain([attempt]);
                self.missing(&few.cloned().collect::<Vec<_>>())?;
            }
        }
        Ok(())
    }

    /// Returns the features that the kernel refuses.
    fn missing(&mut self, attempts: &[Attempt]) -> Result<Vec<MissingFeature>, Error> {
        const WHAT: &str = "a question about features";
        let ops: Vec<Op> = attempts.iter().map(|attempt| attempt.op.clone()).collect();
        let first_seq = self.socket.reserve_numbers(ops.len() as u32 + 2);
        let batch = encode(&Transaction { ops }, first_seq)?;
        let boundary = boundary_len(&batch.bytes);
        let (begin, rest) = batch.bytes.split_at(boundary);
        let mut bytes = begin.to_vec();
        for family in FAMILIES {
            dormant_table(&mut bytes, &table(family), first_seq);
        }
        // The last message is the end, which has the length of the first.
        bytes.extend(rest.get(..rest.len() - boundary).unwrap_or_default());
        self.socket.send(WHAT, &bytes)?;
        let mut missing: Vec<MissingFeature> = Vec::new();
        let read = self.socket.errors(|report| {
            let index = report.seq.wrapping_sub(first_seq) as usize;
            let refused = missing_feature(attempts, index, report.errno);
            missing
                .extend(refused.filter(|feature| {
                    missing.iter().all(|named| named.feature != feature.feature)
                }));
        });
        read.map_err(|source| Error::Receive { what: WHAT, source })?;
        Ok(missing)
    }
}

fn table(family: TableFamily) -> TableId {
    TableId::new(family, "nftlet-features")
}

/// Returns the feature that a message uses. The messages that create the tables have number 0.
fn missing_feature(attempts: &[Attempt], message: usize, errno: i32) -> Option<MissingFeature> {
    let (feature, module) = match message.checked_sub(1) {
        Some(index) => attempts
            .get(index)
            .map(|attempt| (attempt.feature, attempt.module))?,
        None => ("tables", CORE),
    };
    Some(MissingFeature {
        feature,
        module,
        source: io::Error::from_raw_os_error(errno),
    })
}

/// Returns the length of the message that begins a batch.
fn boundary_len(bytes: &[u8]) -> usize {
    bytes
        .first_chunk()
        .map_or(0, |length| u32::from_ne_bytes(*length) as usize)
        .min(bytes.len() / 2)
}

/// Appends the message that creates a table without hooks.
fn dormant_table(bytes: &mut Vec<u8>, table: &TableId, seq: u32) {
    let kind = (libc::NFNL_SUBSYS_NFTABLES << 8 | libc::NFT_MSG_NEWTABLE) as u16;
    let flags = libc::NLM_F_CREATE as u16;
    let start = begin_message(bytes, kind, flags, seq, family_number(table.family));
    let mut writer = AttrWriter::new(bytes);
    writer.string(uapi::NFTA_TABLE_NAME, table.name.as_str());
    writer.be32(uapi::NFTA_TABLE_FLAGS, NFT_TABLE_F_DORMANT);
    end_message(bytes, start);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_message_names_its_feature_and_module() {
        let needs = Needs {
            services: true,
            policies: true,
        };
        let attempts = attempts(TableFamily::Ip6, needs);
        let fib = attempts
            .iter()
            .position(|attempt| attempt.feature == "types of addresses")
            .unwrap();
        let missing = [0, fib + 1]
            .map(|message| missing_feature(&attempts, message, libc::ENOENT))
            .map(Option::unwrap);
        let error = Error::MissingFeatures {
            missing: missing.into(),
        };
        assert_eq!(
            error.to_string(),
            "this kernel lacks features of nftables: tables (module nf_tables): No such file or \
             directory (os error 2); types of addresses (module nft_fib_ipv6): No such file or \
             directory (os error 2); load the modules, or use Linux 5.10 or newer with all of them"
        );
        assert!(missing_feature(&attempts, 99, 1).is_none());
    }

    #[test]
    fn the_document_names_all_modules() {
        let modules: Vec<&str> = modules().into_iter().collect();
        let row = format!("modules       {}\n", modules.join(" "));
        assert!(
            include_str!("../../docs/insight.md").contains(&row),
            "{row}"
        );
    }
}
