//! Single chains and elements are found in the kernel as they were written, and only so.

use nftlet::netlink::Nftables;
use nftlet::nft::{
    Element, Op, Ruleset, RulesetPart, Set, TableFamily, TableId, Transaction, Verdict, diff, text,
};
use nftlet_lab::netns::{Namespace, require_net_admin};

use super::everything::{TABLE, everything};

/// Returns the parts of a table, without what packets write.
fn parts(id: &TableId, ruleset: &Ruleset) -> Vec<RulesetPart> {
    let table = &ruleset.tables[id];
    let chains = table
        .chains
        .iter()
        .map(|(name, chain)| RulesetPart::Chain(id.clone(), name.clone(), chain.clone()));
    let elements = table.sets.iter().flat_map(|(name, set)| {
        set.elements.iter().map(|element| {
            let declaration = set.declaration.clone();
            RulesetPart::Element(id.clone(), name.clone(), declaration, element.clone())
        })
    });
    chains.chain(elements).collect()
}

/// Returns the parts that the kernel does not have.
fn missing(ns: &Namespace, parts: &[RulesetPart]) -> Vec<String> {
    ns.run(|| {
        let mut nftables = Nftables::open().unwrap();
        let missing = parts.iter().filter(|part| !nftables.has(part).unwrap());
        let name = |part: &RulesetPart| [part.object(), part.element().unwrap_or_default()];
        missing
            .map(|part| name(part).join(" ").trim_end().to_owned())
            .collect()
    })
}

#[test]
fn the_kernel_has_what_was_written_until_it_changes() {
    if !require_net_admin() {
        return;
    }
    for family in [TableFamily::Ip, TableFamily::Ip6] {
        let ns = Namespace::new("parts");
        let wanted = everything(family);
        let id = TableId::new(family, TABLE);
        let parts = parts(&id, &wanted);
        assert!(parts.len() > 20, "{}", parts.len());
        assert_eq!(missing(&ns, &parts).len(), parts.len(), "no table");
        let apply = |transaction: Transaction| {
            ns.run(|| Nftables::open()?.apply(&transaction).map(drop))
                .expect("it is written");
        };
        apply(diff(&Ruleset::default(), wanted.clone()));
        assert_eq!(missing(&ns, &parts), [""; 0]);
        let set = |name: &str| wanted.tables[&id].sets[name].clone();
        let (addresses, frontends) = (set("addresses"), set("frontends"));
        let (deleted, moved) = (&addresses.elements[0], &frontends.elements[0]);
        let other = Element::with_verdict(moved.key.clone(), Verdict::Goto("refuse".into()));
        assert_ne!(other.value, moved.value);
        let of = |op: fn(_, _, _, _) -> Op, name: &str, set: &Set, element: &Element| {
            let declaration = set.declaration.clone();
            op(id.clone(), name.into(), declaration, vec![element.clone()])
        };
        apply(Transaction {
            ops: vec![
                of(Op::DeleteElements, "addresses", &addresses, deleted),
                of(Op::DeleteElements, "frontends", &frontends, moved),
                of(Op::AddElements, "frontends", &frontends, &other),
            ],
        });
        let text = |element, set: &Set| text::element(element, &set.declaration, family);
        let elements = [
            format!("set addresses {}", text(deleted, &addresses)),
            format!("map frontends {}", text(moved, &frontends)),
        ];
        assert_eq!(missing(&ns, &parts), elements);
        let keyword = family.keyword();
        let chain = format!("add rule {keyword} {TABLE} services counter");
        ns.nft_load(&chain);
        let chain = "chain services".to_owned();
        assert_eq!(missing(&ns, &parts)[0], chain);
    }
}
