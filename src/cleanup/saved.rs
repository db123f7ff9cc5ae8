//! Parses the output of `iptables-save`, and makes the input of `iptables-restore` that removes
//! kube-proxy's chains.
//!
//! ```text
//! *nat                                              *nat
//! :PREROUTING ACCEPT [0:0]                    ──>   :KUBE-SERVICES - [0:0]       empties the chain
//! :KUBE-SERVICES - [0:0]                            -D PREROUTING -j KUBE-SERVICES
//! -A PREROUTING -j KUBE-SERVICES                    -X KUBE-SERVICES
//! -A KUBE-SERVICES -d 10.96.0.1/32 -j ...           COMMIT
//! COMMIT
//! ```
//!
//! With `--noflush` a table keeps everything that the input does not name, so rules of other
//! programs are not written back.

use std::fmt::Write;

use super::owned;

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct SavedTable<'a> {
    pub(super) name: &'a str,
    /// The chains with their policies; `-` for all but base chains.
    chains: Vec<(&'a str, &'a str)>,
    rules: Vec<SavedRule<'a>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct SavedRule<'a> {
    chain: &'a str,
    /// The argument of `-j` or `-g`.
    target: Option<&'a str>,
    /// What follows `-A CHAIN `.
    body: &'a str,
}

/// What to remove from a table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Removal {
    /// The input of `iptables-restore --noflush`; empty if there is nothing to remove.
    pub(super) input: String,
    /// The number of removed chains.
    pub(super) chains: usize,
    /// The number of rules in other chains that are removed with them, since they jump to them.
    pub(super) jumps: usize,
    /// Chains of kube-proxy that stay because rules of other programs need them.
    pub(super) kept: Vec<String>,
    /// Whether `KUBE-FORWARD` is removed, and the policy of `FORWARD` is to drop.
    pub(super) forward_drops: bool,
}

/// Splits the output of `iptables-save` into tables.
pub(super) fn parse(saved: &str) -> Vec<SavedTable<'_>> {
    let mut tables: Vec<SavedTable> = Vec::new();
    for line in saved.lines() {
        if let Some(name) = line.strip_prefix('*') {
            tables.push(SavedTable {
                name: name.trim(),
                ..SavedTable::default()
            });
            continue;
        }
        let Some(table) = tables.last_mut() else {
            continue;
        };
        if let Some(declaration) = line.strip_prefix(':') {
            let mut words = declaration.split_whitespace();
            if let (Some(name), Some(policy)) = (words.next(), words.next()) {
                table.chains.push((name, policy));
            }
        } else if let Some((chain, body)) = line
            .strip_prefix("-A ")
            .and_then(|rule| rule.split_once(' '))
        {
            let target = target(body);
            table.rules.push(SavedRule {
                chain,
                target,
                body,
            });
        }
    }
    tables
}

/// Returns the target of a rule. Quoted words are skipped, since comments may contain anything.
fn target(body: &str) -> Option<&str> {
    let mut words = Words(body);
    while let Some(word) = words.next() {
        if word == "-j" || word == "-g" {
            return words.next();
        }
    }
    None
}

/// The words of a rule; a quoted one includes its quotes.
struct Words<'a>(&'a str);

impl<'a> Iterator for Words<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let text = self.0.trim_start();
        let (mut quoted, mut escaped) = (false, false);
        let end = text.find(|c: char| {
            if escaped {
                escaped = false;
            } else {
                match c {
                    '\\' if quoted => escaped = true,
                    '"' => quoted = !quoted,
                    _ => return c.is_whitespace() && !quoted,
                }
            }
            false
        });
        let (word, rest) = text.split_at(end.unwrap_or(text.len()));
        self.0 = rest;
        (!word.is_empty()).then_some(word)
    }
}

impl SavedTable<'_> {
    /// Returns how to remove kube-proxy's chains from the table.
    ///
    /// Rules in other chains that jump to them are removed with them. Rules of other programs that
    /// jump to `KUBE-MARK-MASQ` are not: then this chain and `KUBE-POSTROUTING` stay.
    pub(super) fn removal(&self) -> Removal {
        let foreign_marks = self
            .rules
            .iter()
            .any(|rule| rule.target == Some(owned::MARK_MASQ) && !owned::is_chain(rule.chain));
        let stays = |chain: &str| {
            foreign_marks && (chain == owned::MARK_MASQ || chain == owned::POSTROUTING)
        };
        let goes = |chain: &str| owned::is_chain(chain) && !stays(chain);
        let names = || self.chains.iter().map(|(name, _)| *name);
        let chains: Vec<&str> = names().filter(|name| goes(name)).collect();
        let mut removal = Removal {
            chains: chains.len(),
            kept: names().filter(|n| stays(n)).map(str::to_owned).collect(),
            ..Removal::default()
        };
        if chains.is_empty() {
            return removal;
        }
        let mut input = format!("*{}\n", self.name);
        // Writing to a String cannot fail.
        for chain in &chains {
            let _ = writeln!(input, ":{chain} - [0:0]");
        }
        for rule in &self.rules {
            if rule.target.is_some_and(goes) && !goes(rule.chain) {
                let _ = writeln!(input, "-D {} {}", rule.chain, rule.body);
                removal.jumps += 1;
            }
        }
        for chain in &chains {
            let _ = writeln!(input, "-X {chain}");
        }
        input.push_str("COMMIT\n");
        removal.input = input;
        removal.forward_drops =
            chains.contains(&owned::FORWARD) && self.chains.contains(&("FORWARD", "DROP"));
        removal
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: &str = r#"# Generated by iptables-save v1.8.9 on Sat Nov 21 03:59:42 2026
*nat
:PREROUTING ACCEPT [12:720]
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
:KUBE-MARK-DROP - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-NPX46M4PTMTKRN6Y - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A PREROUTING -m comment --comment "not \" -j KUBE-SERVICES" -j DOCKER
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A KUBE-MARK-DROP -j MARK --set-xmark 0x8000/0x8000
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -j KUBE-SVC-NPX46M4PTMTKRN6Y
-A KUBE-SVC-NPX46M4PTMTKRN6Y -j KUBE-MARK-MASQ
COMMIT
# Completed on Sat Nov 21 03:59:42 2026
*filter
:INPUT ACCEPT [0:0]
:KUBE-FIREWALL - [0:0]
-A INPUT -j KUBE-FIREWALL
COMMIT
"#;

    #[test]
    fn chains_and_the_jumps_to_them_are_named_and_nothing_else() {
        let tables = parse(SAVED);
        assert_eq!(tables.len(), 2);
        let removal = tables[0].removal();
        let expected = r#"*nat
:KUBE-MARK-MASQ - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-NPX46M4PTMTKRN6Y - [0:0]
-D PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-D POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-X KUBE-MARK-MASQ
-X KUBE-POSTROUTING
-X KUBE-SERVICES
-X KUBE-SVC-NPX46M4PTMTKRN6Y
COMMIT
"#;
        assert_eq!(removal.input, expected);
        assert_eq!((removal.chains, removal.jumps), (4, 2));
        assert_eq!(tables[1].removal(), Removal::default());
    }

    #[test]
    fn masquerading_that_others_ask_for_stays() {
        let saved = SAVED.replace(
            "-A KUBE-SERVICES",
            "-A CNI-HOSTPORT-SETMARK -j KUBE-MARK-MASQ\n-A KUBE-SERVICES",
        );
        let removal = parse(&saved)[0].removal();
        assert_eq!(removal.kept, ["KUBE-MARK-MASQ", "KUBE-POSTROUTING"]);
        assert_eq!((removal.chains, removal.jumps), (2, 1));
        assert!(!removal.input.contains("POSTROUTING"), "{}", removal.input);
        assert!(!removal.input.contains("MARK-MASQ"), "{}", removal.input);
    }

    #[test]
    fn a_policy_that_drops_is_noticed() {
        let saved = "*filter\n:FORWARD DROP [0:0]\n:KUBE-FORWARD - [0:0]\n\
                     -A FORWARD -j KUBE-FORWARD\nCOMMIT\n";
        assert!(parse(saved)[0].removal().forward_drops);
        let accepts = saved.replace("DROP", "ACCEPT");
        assert!(!parse(&accepts)[0].removal().forward_drops);
    }

    #[test]
    fn goto_counts_and_nonsense_is_skipped() {
        assert_eq!(target("-p tcp -g KUBE-SERVICES"), Some("KUBE-SERVICES"));
        assert_eq!(target("-m comment --comment \"-j X\""), None);
        assert_eq!(target("-j"), None);
        assert!(parse("-A INPUT -j X\n:A\nnonsense\n").is_empty());
        let tables = parse("*raw\n:\n:X\n-A\n-A X\nCOMMIT\n");
        assert!(tables[0].chains.is_empty() && tables[0].rules.is_empty());
    }
}
