//! Who can connect to whom in one side and not in the other.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde::Serialize;

use crate::insight::Facts;
use crate::insight::reach::{By, Cell, Columns, INTERNET, Reach, Row};

/// Two workloads or namespaces with other connections than before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct PairChange {
    pub from: String,
    pub to: String,
    /// The connections in each side; none without a pod of both ends.
    pub before: Option<String>,
    pub after: Option<String>,
}

/// Compares who can connect to whom. Returns also what is assumed because facts lack it.
pub(super) fn of(
    names: [&str; 2],
    facts: [&Facts; 2],
    not_compared: &mut Vec<String>,
) -> (Vec<PairChange>, Vec<String>) {
    let sides = facts.map(Reach::new);
    for (name, error) in names.iter().zip(&sides) {
        if let Err(error) = error {
            not_compared.push(format!("reachability: {error} ({name})"));
        }
    }
    let [Ok(before), Ok(after)] = &sides else {
        return Default::default();
    };
    let reaches = [before, after];
    let assumptions = names.iter().zip(reaches).flat_map(|(name, reach)| {
        let assumptions = reach.assumptions().into_iter();
        assumptions.map(move |assumption| format!("{name}: {assumption}"))
    });
    // All rows have a name of a pod.
    let rows = reaches.map(|reach| reach.rows(By::Workload, &[]).unwrap_or_default());
    let [a, b] = &rows;
    let changes = changes([Side::new(before, a), Side::new(after, b)]);
    (changes, assumptions.collect())
}

struct Side<'r> {
    reach: &'r Reach<'r>,
    rows: HashMap<&'r str, (usize, &'r Row)>,
    columns: Columns<'r>,
}

impl<'r> Side<'r> {
    fn new(reach: &'r Reach<'r>, rows: &'r [Row]) -> Self {
        let numbered = rows.iter().enumerate();
        let numbered = numbered.map(|(number, row)| (&*row.name, (number, row)));
        Self {
            reach,
            rows: numbered.collect(),
            columns: Columns::new(reach, rows),
        }
    }
}

/// What a row can connect to in one column, in both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Value {
    /// There is no pair of different pods.
    NoPair,
    Equal,
    /// An index of [`Words`].
    Differs(usize),
}

/// The differences, in words.
#[derive(Default)]
struct Words {
    all: Vec<[Option<String>; 2]>,
    indices: HashMap<[Option<String>; 2], usize>,
    /// What is known of the cells of both sides. `None` is a pair of which one end is missing.
    known: HashMap<[Option<Cell>; 2], Value>,
}

impl Words {
    fn value(&mut self, sides: &[Side; 2], cells: [Option<Cell>; 2]) -> Value {
        if let Some(known) = self.known.get(&cells) {
            return *known;
        }
        let [a, b] = sides;
        let [before, after] = cells;
        let words = [
            before.map(|cell| a.reach.connections(cell)),
            after.map(|cell| b.reach.connections(cell)),
        ];
        let [before, after] = words.each_ref().map(|it| it.as_deref().unwrap_or(NOTHING));
        let value = if before == after {
            Value::Equal
        } else {
            let next = self.all.len();
            let index = *self.indices.entry(words.clone()).or_insert(next);
            if index == next {
                self.all.push(words);
            }
            Value::Differs(index)
        };
        self.known.insert(cells, value);
        value
    }
}

/// What a missing end can connect to.
const NOTHING: &str = "No Connections";

/// Compares the workloads of both sides. Where those of whole namespaces agree, the namespace stands
/// for them.
fn changes(sides: [Side; 2]) -> Vec<PairChange> {
    let names = sides.iter().flat_map(|side| side.rows.keys().copied());
    let names: BTreeSet<&str> = names.collect();
    let names: Vec<&str> = names.into_iter().collect();
    let namespaces: Vec<&[&str]> = names
        .chunk_by(|a, b| namespace(a) == namespace(b))
        .collect();
    let mut words = Words::default();
    let mut found = Vec::new();
    for sources in &namespaces {
        let rows = sources.iter().map(|from| {
            let values = values(&sides, from, &names, &mut words);
            joined_destinations(&namespaces, &values)
        });
        let rows: Vec<OfRow> = rows.collect();
        found.extend(joined_sources(sources, &rows));
    }
    found.sort_by_cached_key(|(from, to, _)| {
        [from, to].map(|name| (name == INTERNET, name.clone()))
    });
    let changes = found.into_iter().filter_map(|(from, to, index)| {
        let [before, after] = words.all.get(index)?.clone();
        Some(PairChange {
            from,
            to,
            before,
            after,
        })
    });
    changes.collect()
}

/// Returns the values of a row in all columns.
fn values(sides: &[Side; 2], from: &str, names: &[&str], words: &mut Words) -> Vec<Value> {
    let cells = sides.each_ref().map(|side| {
        let row = side.rows.get(from);
        let row = row.map(|(_, row)| *row);
        row.map(|row| {
            let cell = |to: &Row| side.reach.cell(row, to);
            side.columns.each(side.reach, row, cell)
        })
    });
    let values = names.iter().map(|to| {
        let mut is_pair = true;
        let mut of_side = |at: usize| -> Option<Cell> {
            let (side, cells) = (sides.get(at)?, cells.get(at)?.as_ref()?);
            let (number, _) = side.rows.get(to)?;
            let cell = cells.get(*number).copied().flatten();
            is_pair &= cell.is_some();
            cell
        };
        let cells = [of_side(0), of_side(1)];
        match is_pair {
            true => words.value(sides, cells),
            false => Value::NoPair,
        }
    });
    values.collect()
}

/// The differences of one row: the destination, a workload or a namespace, and the index of the words.
#[derive(Debug, Default)]
struct OfRow {
    differences: Vec<(String, usize)>,
    /// Workloads with which it has no pair.
    no_pair: BTreeSet<String>,
}

fn joined_destinations(namespaces: &[&[&str]], values: &[Value]) -> OfRow {
    let mut row = OfRow::default();
    let mut rest = values;
    for names in namespaces {
        let Some((of_names, others)) = rest.split_at_checked(names.len()) else {
            break;
        };
        rest = others;
        let pairs = of_names.iter().filter(|value| **value != Value::NoPair);
        let distinct: Vec<&Value> = pairs.clone().collect();
        if let [Value::Differs(index), _, ..] = &*distinct
            && distinct
                .iter()
                .all(|value| **value == Value::Differs(*index))
        {
            let name = names.first().map_or("", |name| namespace(name));
            row.differences.push((name.to_owned(), *index));
            continue;
        }
        for (name, value) in names.iter().zip(of_names) {
            match value {
                Value::Equal => {}
                Value::NoPair => {
                    row.no_pair.insert((*name).to_owned());
                }
                Value::Differs(index) => row.differences.push(((*name).to_owned(), *index)),
            }
        }
    }
    row
}

/// Joins the rows of one namespace.
fn joined_sources(sources: &[&str], rows: &[OfRow]) -> Vec<(String, String, usize)> {
    let mut of: BTreeMap<(&String, usize), Vec<&str>> = BTreeMap::new();
    for (from, row) in sources.iter().zip(rows) {
        for (to, index) in &row.differences {
            of.entry((to, *index)).or_default().push(from);
        }
    }
    let mut found = Vec::new();
    for ((to, index), from) in of {
        let have_none = rows.iter().filter(|row| row.no_pair.contains(to)).count();
        let are_all = from.len() > 1 && from.len().saturating_add(have_none) == sources.len();
        if are_all {
            let name = from.first().map_or("", |name| namespace(name));
            found.push((name.to_owned(), to.clone(), index));
        } else {
            let each = from.into_iter();
            found.extend(each.map(|from| (from.to_owned(), to.clone(), index)));
        }
    }
    found
}

fn namespace(workload: &str) -> &str {
    workload
        .split_once('/')
        .map_or(workload, |(namespace, _)| namespace)
}

#[cfg(test)]
mod tests {
    use super::Value::{Differs, Equal, NoPair};
    use super::*;

    const NAMES: [&str; 5] = ["a/x", "a/y", "a/z", "b/x", "internet"];

    /// Joins a matrix of values.
    fn joined(rows: [[Value; 5]; 5]) -> Vec<String> {
        let of = |a: &&str, b: &&str| namespace(a) == namespace(b);
        let namespaces: Vec<&[&str]> = NAMES.chunk_by(of).collect();
        let rows = rows.iter();
        let mut rows = rows.map(|row| joined_destinations(&namespaces, row));
        let mut found = Vec::new();
        for sources in &namespaces {
            let rows: Vec<OfRow> = rows.by_ref().take(sources.len()).collect();
            let joined = joined_sources(sources, &rows).into_iter();
            found.extend(joined.map(|(from, to, index)| format!("{from} {to} {index}")));
        }
        found
    }

    #[test]
    fn a_namespace_stands_for_its_workloads_where_all_agree() {
        let none = [Equal; 5];
        // A workload of one pod has no pair with itself.
        let [mut x, mut y, mut z] = [[Differs(0); 5]; 3];
        (x[0], y[1], z[2]) = (NoPair, NoPair, NoPair);
        (x[3], y[3], z[3]) = (Equal, Equal, Differs(1));
        let all = joined([x, y, z, none, none]);
        assert_eq!(all, ["a a 0", "a/z b/x 1", "a internet 0"]);
        y[0] = Equal;
        let some = joined([x, y, z, none, none]);
        let wanted = [
            "a/x a 0",
            "a/z a 0",
            "a/y a/z 0",
            "a/z b/x 1",
            "a internet 0",
        ];
        assert_eq!(some, wanted);
        // One pair that differs does not stand for a namespace.
        let one = [Equal, Equal, Equal, Differs(0), NoPair];
        assert_eq!(joined([none, none, none, none, one]), ["internet b/x 0"]);
    }
}
