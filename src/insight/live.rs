//! What the kernel says of the connections of an answer: whether it has the rules that decide, to which
//! endpoint a client is bound, which connections it tracks, and how many packets it denied.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt::{self, Write};
use std::net::IpAddr;
use std::time::Duration;

use super::answer::{Answer, Code, TargetAnswer, Verdict};
use super::evidence::{
    Affinity, Connections, Drops, ElementKey, Live, Pair, Row, RuleName, TrackedConnection,
};
use crate::model::Family;
use crate::nft::RulesetPart;
use crate::services::Target;

/// The most chains and elements that are compared with the kernel's.
const MOST_COMPARED: usize = 200;
/// The most pairs of a client and a destination whose connections are counted: for each the kernel walks
/// all connections.
const MOST_PAIRS: usize = 8;
/// The most connections that are shown.
const MOST_SHOWN: usize = 5;

/// The kernel, as far as answers need it.
pub(crate) trait KernelView {
    type Error: fmt::Display;

    /// Returns whether the kernel has a chain or an element.
    fn has(&mut self, part: &RulesetPart) -> Result<bool, Self::Error>;

    /// Returns the endpoint in an element of an affinity map, and how long it remains.
    fn affinity(&mut self, at: &ElementKey) -> Result<Option<(Target, Duration)>, Self::Error>;

    /// Returns the packets that an element counted.
    fn packets(&mut self, at: &ElementKey) -> Result<Option<u64>, Self::Error>;

    /// Calls `each` with the tracked connections of a pair and with what distinguishes them.
    fn connections(
        &mut self,
        pair: &Pair,
        each: &mut dyn FnMut(u32, TrackedConnection),
    ) -> Result<(), Self::Error>;
}

/// Adds what the kernel says to an answer that names the rules.
pub(crate) fn add<K: KernelView>(answer: &mut Answer, changes_waiting: usize, kernel: &mut K) {
    let compared = compare(answer, kernel).and_then(|not_compared| {
        let affinity = bind(answer, kernel)?;
        let drops = drops(answer, kernel)?;
        Ok((not_compared, affinity, drops))
    });
    let (not_compared, affinity, drops) = match compared {
        Ok(compared) => compared,
        Err(error) => {
            answer.warnings.push(not_read(&error));
            return;
        }
    };
    // Some kernels have no connection tracking over netlink.
    let connections = connections(answer, kernel).unwrap_or_else(|error| {
        answer.warnings.push(not_read(&error));
        None
    });
    answer.live = Some(Live {
        not_compared,
        changes_waiting,
        affinity,
        connections,
        drops,
    });
}

/// Returns the warning that the kernel could not be asked.
pub(crate) fn not_read(error: &dyn fmt::Display) -> String {
    format!("what the kernel has is not shown: {error}")
}

/// Records which of the rules the kernel has. Returns how many are beyond the limit.
fn compare<K: KernelView>(answer: &mut Answer, kernel: &mut K) -> Result<usize, K::Error> {
    let mut known: BTreeMap<Row, bool> = BTreeMap::new();
    let mut left = BTreeSet::new();
    for rule in rules_mut(answer) {
        let row = rule.row();
        rule.in_kernel = match known.get(&row) {
            Some(known) => Some(*known),
            None if known.len() >= MOST_COMPARED => {
                left.insert(row);
                None
            }
            None => {
                let found = kernel.has(&rule.part)?;
                known.insert(row, found);
                Some(found)
            }
        };
    }
    Ok(left.len())
}

fn rules_mut(answer: &mut Answer) -> impl Iterator<Item = &mut RuleName> {
    let targets = answer.targets.iter_mut();
    let decisions = targets.flat_map(|target| [&mut target.egress, &mut target.ingress]);
    let of_policies = decisions.filter_map(|decision| decision.rules.as_mut());
    let of_service = answer.service.rules.as_mut().into_iter();
    of_service.chain(of_policies).flatten()
}

/// Leaves only the endpoints to which session affinity binds the clients. Returns the first of them.
fn bind<K: KernelView>(answer: &mut Answer, kernel: &mut K) -> Result<Option<Affinity>, K::Error> {
    let mut first = None;
    let pairs = answer.subjects.pairs.clone();
    for pair in &pairs {
        let Some(at) = &pair.affinity else {
            continue;
        };
        let Some((target, remains)) = kernel.affinity(at)? else {
            continue;
        };
        let client = pair.client;
        first.get_or_insert(Affinity {
            client,
            endpoint: target.into(),
            expires_seconds: remains.as_secs(),
        });
        let mut of_client = pairs.iter().filter(|other| other.client == client);
        // Targets do not say to which of several destinations they belong.
        if of_client.nth(1).is_some() {
            continue;
        }
        bind_to(answer, client, target);
    }
    Ok(first)
}

/// Leaves only one endpoint to a client, if it is among those of the answer.
fn bind_to(answer: &mut Answer, client: IpAddr, (address, port): Target) {
    let family = Family::of(client);
    let is_of_client = |target: &TargetAnswer| {
        Family::of(target.address) == family && target.source.is_none_or(|it| it == client)
    };
    let is_bound = |target: &TargetAnswer| (target.address, target.port) == (address, Some(port));
    let mut targets = answer.targets.iter();
    if !targets.any(|target| is_of_client(target) && is_bound(target)) {
        return;
    }
    answer
        .targets
        .retain(|target| !is_of_client(target) || is_bound(target));
    for target in answer.targets.iter_mut().filter(|it| is_of_client(it)) {
        if target.verdict == Verdict::Allowed {
            target.code = Code::Affinity;
        }
    }
    let is_refused = matches!(
        answer.code,
        Code::ServiceNoEndpoints
            | Code::ServiceNoLocalEndpoints
            | Code::ServicePortUnknown
            | Code::ServiceAddressUnknown
            | Code::SourceRange
    );
    // With several ports, or where a service refuses a part, the verdict is also that of others.
    if answer.ports.is_empty() && !is_refused {
        answer.verdict = Verdict::of_all(answer.targets.iter().map(|target| target.verdict));
        let mut targets = answer.targets.iter();
        let denied = targets.find(|target| target.verdict != Verdict::Allowed);
        if let Some(says_most) = denied.or(answer.targets.first()) {
            answer.code = says_most.code;
        }
    }
}

fn connections<K: KernelView>(
    answer: &Answer,
    kernel: &mut K,
) -> Result<Option<Connections>, K::Error> {
    let pairs = &answer.subjects.pairs;
    if pairs.len() > MOST_PAIRS {
        return Ok(None);
    }
    let mut found = Connections::default();
    for pair in pairs {
        let mut seen = HashSet::new();
        kernel.connections(pair, &mut |id, connection| {
            if seen.insert(id) && found.shown.len() < MOST_SHOWN {
                found.shown.push(connection);
            }
        })?;
        found.count += seen.len();
    }
    Ok(Some(found))
}

fn drops<K: KernelView>(answer: &Answer, kernel: &mut K) -> Result<Vec<Drops>, K::Error> {
    let mut drops: Vec<Drops> = Vec::new();
    for counter in answer.subjects.counters.iter().take(MOST_COMPARED) {
        let Some(packets) = kernel.packets(&counter.at)? else {
            continue;
        };
        let direction = counter.direction.as_str();
        let mut known = drops.iter_mut();
        // A pod may have an address of each family.
        match known.find(|it| it.pod == counter.pod && it.direction == direction) {
            Some(known) => known.packets = known.packets.saturating_add(packets),
            None => drops.push(Drops {
                pod: counter.pod.clone(),
                direction,
                packets,
            }),
        }
    }
    Ok(drops)
}

/// Writes what the kernel says: `line` writes a row with a word and a text.
pub(super) fn write(
    answer: &Answer,
    mut line: impl FnMut(&str, &str, Verdict, &str) -> fmt::Result,
) -> fmt::Result {
    let Some(live) = &answer.live else {
        return Ok(());
    };
    kernel(answer, live, &mut line)?;
    if let Some(bound) = &live.affinity {
        let (endpoint, seconds) = (bound.endpoint, bound.expires_seconds);
        let text = format!("{} to {endpoint} for {seconds} s more", bound.client);
        line("affinity", "BOUND", Verdict::Allowed, &text)?;
    }
    match &live.connections {
        None => line("tracked", "-", Verdict::Allowed, "not counted")?,
        Some(connections) => {
            let mut word = connections.count.to_string();
            if connections.shown.is_empty() {
                line("tracked", &word, Verdict::Allowed, "no connection")?;
            }
            for (index, shown) in connections.shown.iter().enumerate() {
                let mut text = format!("{} {} -> {}", shown.state, shown.client, shown.endpoint);
                let more = connections.count.saturating_sub(connections.shown.len());
                if more > 0 && index + 1 == connections.shown.len() {
                    write!(text, ", and {more} more")?;
                }
                let what = if index == 0 { "tracked" } else { "" };
                line(what, &word, Verdict::Allowed, &text)?;
                word.clear();
            }
        }
    }
    for drops in &live.drops {
        let verdict = if drops.packets == 0 {
            Verdict::Allowed
        } else {
            Verdict::Denied
        };
        let text = format!("packets of {}, {}", drops.pod, drops.direction);
        line("denied", &drops.packets.to_string(), verdict, &text)?;
    }
    Ok(())
}

fn kernel(
    answer: &Answer,
    live: &Live,
    line: &mut impl FnMut(&str, &str, Verdict, &str) -> fmt::Result,
) -> fmt::Result {
    let decisions = answer
        .targets
        .iter()
        .flat_map(|it| [&it.egress, &it.ingress]);
    let of_policies = decisions.flat_map(|decision| decision.rules.iter().flatten());
    let of_service = answer.service.rules.iter().flatten();
    let rules = of_service.chain(of_policies);
    let compared: BTreeSet<Row> = rules
        .filter(|rule| rule.in_kernel.is_some())
        .map(RuleName::row)
        .collect();
    let all = compared.len();
    let missing = compared.iter().filter(|row| row.in_kernel == Some(false));
    let missing = missing.count();
    let (word, verdict, mut text) = match (all, missing) {
        (0, _) => ("-", Verdict::Allowed, "no rule decides".to_owned()),
        (_, 0) => {
            let text = format!("it has all {all} chains and elements above");
            ("AGREES", Verdict::Allowed, text)
        }
        _ => {
            let text = format!("{missing} of {all} chains and elements above are not in it");
            ("DIFFERS", Verdict::Denied, text)
        }
    };
    if missing > 0 && live.changes_waiting > 0 {
        write!(
            text,
            "; {} changes wait to be written",
            live.changes_waiting
        )?;
    }
    if live.not_compared > 0 {
        write!(text, "; {} more were not compared", live.not_compared)?;
    }
    line("kernel", word, verdict, &text)
}

#[cfg(test)]
mod tests;
