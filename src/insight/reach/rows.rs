//! Rows of the matrix: pods, workloads or namespaces, and what they can connect to.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::IpAddr;

use super::classes::{Classes, Holder};
use super::decisions::{Cause, Decisions};
use super::port_set::{PortSet, SetId};
use super::subjects::{Addresses, By, INTERNET, Subject, Subjects, without_kind};
use crate::insight::Facts;
use crate::insight::names::outside;
use crate::model::{ObjectName, Pod};

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ReachError {
    #[error(
        "no Pods with an address are known{0}; give a dump that has them, or ask the API server with --live or --kubeconfig"
    )]
    NoPods(&'static str),
    #[error(
        "there is no namespace, workload or pod {0}; write namespace, namespace/name or internet"
    )]
    Unknown(String),
    #[error(
        "{0} rows or columns are too many for one page; ask --by workload or namespace, or about some with --from and --to"
    )]
    TooManyRows(usize),
    #[error("--exposed has no page; leave out -o html, or ask for -o json")]
    ExposedPage,
    #[error("`{0}` is not a port; write TCP/80, UDP/8000-8080, TCP, ICMP or all")]
    Port(String),
}

/// The pods with one class in a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Member {
    class: usize,
    /// One of the pods.
    first: usize,
    /// Whether there are several.
    are_several: bool,
    /// Where they are, sorted.
    homes: Vec<usize>,
}

/// A row or a column of the matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub name: String,
    /// The number of pods; 0 for addresses outside of the cluster.
    pub pods: usize,
    pub(super) members: Vec<Member>,
    subjects: BTreeSet<usize>,
}

/// What one row can connect to in another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Cell {
    /// What all pods can connect to, at all of their addresses.
    pub all: SetId,
    /// What at least one pod can connect to.
    pub some: SetId,
}

/// Why a pair of classes can connect or cannot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Causes {
    /// Of the source and of the destination.
    pub ends: [Option<Cause>; 2],
    /// Whether the source is a node that also reaches its own pods.
    pub of_node: bool,
}

/// Who can connect to whom.
pub(crate) struct Reach<'a> {
    facts: &'a Facts<'a>,
    subjects: Vec<Subject>,
    classes: Vec<Addresses>,
    pub(super) decisions: Decisions<'a>,
    /// By family and home of a node: the homes of its own pods.
    own: [HashMap<usize, Vec<usize>>; 2],
    without_address: usize,
    /// Host-network pods whose addresses no Node has.
    without_node: usize,
}

impl<'a> Reach<'a> {
    /// Decides about all pods.
    ///
    /// # Errors
    ///
    /// If there are none.
    pub fn new(facts: &'a Facts<'a>) -> Result<Self, ReachError> {
        let inventory = facts.policies.inventory();
        let mut pods: Vec<&Pod> = inventory.pods().filter(|pod| !pod.ended).collect();
        let known = pods.len();
        pods.retain(|pod| !pod.addresses.is_empty());
        if pods.is_empty() {
            let why = match facts.others {
                None => " to the agent, which reads Pods only while there is a policy",
                Some(_) => "",
            };
            return Err(ReachError::NoPods(why));
        }
        let without_address = known - pods.len();
        pods.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let mut classes = Classes::new(facts, &pods);
        let mut subjects = Subjects::default();
        for pod in &pods {
            let addresses = pod.addresses.iter();
            let of_pod: Vec<_> = addresses
                .map(|address| (*address, classes.class(*address, Some(pod))))
                .collect();
            let holder = of_pod
                .first()
                .and_then(|(_, class)| classes.all.get(*class));
            let holder = holder.map_or(Holder::Outside, |class| class.holder);
            subjects.add_pod(pod, &of_pod, holder);
        }
        for address in outside(facts) {
            let class = classes.class(address, None);
            subjects.add_outside(address, class);
        }
        let decisions = Decisions::new(classes, facts);
        let own = subjects.own(facts, &decisions);
        Ok(Self {
            facts,
            subjects: subjects.all,
            classes: subjects.classes,
            decisions,
            own,
            without_address,
            without_node: subjects.without_node,
        })
    }

    /// Returns what is assumed because the facts lack it.
    pub fn assumptions(&self) -> Vec<String> {
        let mut lacking = Vec::new();
        let inventory = self.facts.policies.inventory();
        if inventory.counts().1 == 0 {
            lacking
                .push("no Namespaces: namespaceSelectors see only the names of namespaces".into());
        }
        if self.without_node > 0 {
            let (who, hint) = match self.facts.others {
                None => (
                    "the agent knows no other Node",
                    "; ask with --live or --kubeconfig",
                ),
                Some(_) => ("no Node", ""),
            };
            lacking.push(format!(
                "{who} with the addresses of {} host-network pods, which are taken for addresses \
                 outside of the cluster{hint}",
                self.without_node
            ));
        }
        if self.without_address > 0 {
            lacking.push(format!(
                "{} pods have no address yet and are left out",
                self.without_address
            ));
        }
        lacking
    }

    /// Returns the rows of the pods that some names select; of all, and of the addresses outside of the
    /// cluster, without names. A name of a pod selects a row of this pod alone.
    ///
    /// # Errors
    ///
    /// If a name selects nothing.
    pub fn rows(&self, by: By, names: &[String]) -> Result<Vec<Row>, ReachError> {
        let mut rows: BTreeMap<(bool, &str), BTreeSet<usize>> = BTreeMap::new();
        let mut add = |name, at: usize| {
            rows.entry((name == INTERNET, name)).or_default().insert(at);
        };
        if names.is_empty() {
            for (at, subject) in self.subjects.iter().enumerate() {
                add(subject.named(by), at);
            }
        }
        for name in names {
            let wanted = without_kind(name);
            let mut is_known = false;
            for (at, subject) in self.subjects.iter().enumerate() {
                let row = subject.selected(wanted, by);
                is_known |= row.is_some();
                if let Some(row) = row {
                    add(row, at);
                }
            }
            if !is_known {
                return Err(ReachError::Unknown(name.clone()));
            }
        }
        let rows = rows.into_iter().map(|((_, name), subjects)| {
            let members = self.members(&subjects);
            let pods = if name == INTERNET { 0 } else { subjects.len() };
            Row {
                name: name.to_owned(),
                pods,
                members,
                subjects,
            }
        });
        Ok(rows.collect())
    }

    /// Returns one row of all pods that a name selects.
    pub fn row(&self, name: &str) -> Result<Row, ReachError> {
        let rows = self.rows(By::Pod, &[name.to_owned()])?;
        Ok(union(name.to_owned(), rows.iter()))
    }

    fn members(&self, subjects: &BTreeSet<usize>) -> Vec<Member> {
        let mut members: BTreeMap<usize, Member> = BTreeMap::new();
        for at in subjects {
            let Some(subject) = self.subjects.get(*at) else {
                continue;
            };
            let member = members.entry(subject.class).or_insert_with(|| Member {
                class: subject.class,
                first: *at,
                are_several: false,
                homes: Vec::new(),
            });
            member.are_several |= member.first != *at;
            if let Err(place) = member.homes.binary_search(&subject.home) {
                member.homes.insert(place, subject.home);
            }
        }
        members.into_values().collect()
    }

    /// Returns what one row can connect to in another; `None` if they have no pair of different pods
    /// with addresses of the same family.
    pub fn cell(&self, from: &Row, to: &Row) -> Option<Cell> {
        let mut cell: Option<Cell> = None;
        self.pairs(from, to, |_, _, pair| {
            let (all, some) = cell.map_or((pair.all, pair.some), |known| {
                let (all, _) = self.decisions.both_and_either(known.all, pair.all);
                let (_, some) = self.decisions.both_and_either(known.some, pair.some);
                (all, some)
            });
            cell = Some(Cell { all, some });
            // More pairs change nothing.
            all != SetId::NONE || some != SetId::ALL
        });
        cell
    }

    /// Returns whether what a row can connect to depends on the nodes of pods, and not on their classes
    /// alone.
    pub(super) fn depends_on_nodes(&self, from: &Row) -> bool {
        let mut homes = from.members.iter().flat_map(|member| &member.homes);
        homes.any(|home| self.own.iter().any(|own| own.contains_key(home)))
    }

    /// Calls `each` with each pair of classes of addresses of different pods until it returns false.
    fn pairs(&self, from: &Row, to: &Row, mut each: impl FnMut(usize, usize, Cell) -> bool) {
        if from.name == INTERNET && to.name == INTERNET {
            return;
        }
        for source in &from.members {
            for destination in &to.members {
                let is_same = source.first == destination.first
                    && !source.are_several
                    && !destination.are_several;
                if is_same {
                    continue;
                }
                let [Some(of_source), Some(of_destination)] =
                    [source.class, destination.class].map(|class| self.classes.get(class))
                else {
                    continue;
                };
                let families = of_source.iter().zip(of_destination).zip(&self.own);
                for ((one, other), own) in families {
                    let (Some(one), Some(other)) = (one, other) else {
                        continue;
                    };
                    let set = self.decisions.between(*one, *other);
                    let cell = match own_pairs(own, source, destination) {
                        Own::None => Cell {
                            all: set,
                            some: set,
                        },
                        Own::Some => Cell {
                            all: set,
                            some: SetId::ALL,
                        },
                        Own::All => Cell {
                            all: SetId::ALL,
                            some: SetId::ALL,
                        },
                    };
                    if !each(*one, *other, cell) {
                        return;
                    }
                }
            }
        }
    }

    /// Returns the reasons of the pairs of classes in two rows for which `counts` returns true, at most
    /// so many, each once.
    pub(super) fn reasons(
        &self,
        from: &Row,
        to: &Row,
        most: usize,
        counts: impl Fn(Cell) -> bool,
    ) -> Vec<Causes> {
        let mut found = Vec::new();
        self.pairs(from, to, |one, other, cell| {
            let reasons = Causes {
                ends: self.decisions.reasons(one, other),
                of_node: cell.some == SetId::ALL
                    && self.decisions.between(one, other) != SetId::ALL,
            };
            if counts(cell) && !found.contains(&reasons) {
                found.push(reasons);
            }
            found.len() < most
        });
        found
    }

    /// Returns the rows joined that have pods of the same classes: all that can be said of one is true
    /// of the others. Each is named by its first row, and comes with the names of all.
    pub fn joined<'r>(&self, rows: impl IntoIterator<Item = &'r Row>) -> Vec<(Row, Vec<&'r str>)> {
        let mut alike: BTreeMap<Vec<usize>, Vec<&Row>> = BTreeMap::new();
        for row in rows {
            let classes = row.members.iter().map(|member| member.class).collect();
            alike.entry(classes).or_default().push(row);
        }
        let joined = alike.into_values().map(|rows| {
            let name = rows.first().map_or("", |row| &row.name).to_owned();
            let names = rows.iter().map(|row| &*row.name).collect();
            (union(name, rows), names)
        });
        let mut joined: Vec<_> = joined.collect();
        let last = |name: &str| (name == INTERNET, name.to_owned());
        joined.sort_by_key(|(row, _)| last(&row.name));
        joined
    }

    pub(super) fn facts(&self) -> &'a Facts<'a> {
        self.facts
    }

    /// Returns the addresses of the pods of a row.
    pub(super) fn addresses(&self, row: &Row) -> BTreeSet<IpAddr> {
        let inventory = self.facts.policies.inventory();
        let subjects = row.subjects.iter().filter_map(|at| self.subjects.get(*at));
        let pods = subjects.filter_map(|subject| {
            let (namespace, name) = subject.pod.split_once('/')?;
            inventory.pod(&ObjectName::new(namespace, name))
        });
        pods.flat_map(|pod| pod.addresses.iter().copied()).collect()
    }

    /// Returns the sources outside of a namespace, in one row.
    pub(super) fn others(&self, namespace: &str) -> Row {
        let others = self.subjects.iter().enumerate();
        let others = others
            .filter(|(_, it)| it.namespace != namespace && it.pod != INTERNET)
            .map(|(at, _)| at);
        let others: BTreeSet<usize> = others.collect();
        Row {
            name: "other namespaces".to_owned(),
            pods: others.len(),
            members: self.members(&others),
            subjects: others,
        }
    }

    /// Returns the connections of a cell in one line.
    pub fn connections(&self, cell: Cell) -> String {
        let all = self.set(cell.all);
        if cell.all == cell.some {
            return all.to_string();
        }
        format!("{all} (some: {})", self.set(cell.some))
    }

    pub(super) fn set(&self, id: SetId) -> PortSet {
        self.decisions.set(id)
    }
}

/// Joins rows.
fn union<'r>(name: String, rows: impl IntoIterator<Item = &'r Row>) -> Row {
    let mut members: BTreeMap<usize, Member> = BTreeMap::new();
    let mut pods = 0_usize;
    let mut subjects = BTreeSet::new();
    for row in rows {
        subjects.extend(&row.subjects);
        pods = pods.saturating_add(row.pods);
        for member in &row.members {
            let Some(known) = members.get_mut(&member.class) else {
                members.insert(member.class, member.clone());
                continue;
            };
            known.are_several |= member.are_several || known.first != member.first;
            let homes: BTreeSet<usize> = known.homes.iter().chain(&member.homes).copied().collect();
            known.homes = homes.into_iter().collect();
        }
    }
    Row {
        name,
        pods,
        members: members.into_values().collect(),
        subjects,
    }
}

/// Which pairs of two members are a node and a pod on it.
enum Own {
    None,
    Some,
    All,
}

fn own_pairs(own: &HashMap<usize, Vec<usize>>, from: &Member, to: &Member) -> Own {
    if own.is_empty() {
        return Own::None;
    }
    let of_nodes = from.homes.iter().filter_map(|home| own.get(home));
    let pairs = of_nodes.map(|pods| {
        let here = pods.iter();
        here.filter(|pod| to.homes.binary_search(pod).is_ok())
            .count()
    });
    let pairs = pairs.fold(0, usize::saturating_add);
    if pairs == 0 {
        Own::None
    } else if pairs == from.homes.len().saturating_mul(to.homes.len()) {
        Own::All
    } else {
        Own::Some
    }
}

impl fmt::Debug for Reach<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reach")
            .field("subjects", &self.subjects.len())
            .field("classes", &self.classes.len())
            .finish_non_exhaustive()
    }
}
