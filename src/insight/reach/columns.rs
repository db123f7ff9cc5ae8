//! The columns of the matrix. Equal ones are asked about once.

use std::collections::HashMap;

use super::rows::{Reach, Row};

/// Columns, with equal ones joined.
pub(crate) struct Columns<'r> {
    rows: &'r [Row],
    joined: Vec<Row>,
    /// The index in `joined` of each column.
    joined_in: Vec<usize>,
}

/// What is said of a row in each column.
pub(super) struct OfColumns<T> {
    pub all: Vec<T>,
    /// In the column of the row itself, if there is one: the index, and what is said there instead.
    pub own: Option<(usize, T)>,
}

impl<'r> Columns<'r> {
    pub fn new(reach: &Reach, rows: &'r [Row]) -> Self {
        let joined = reach.joined(rows);
        let mut indices: HashMap<&str, usize> = HashMap::new();
        for (index, (_, names)) in joined.iter().enumerate() {
            indices.extend(names.iter().map(|name| (*name, index)));
        }
        let joined_in = rows.iter();
        let joined_in = joined_in.filter_map(|row| indices.get(&*row.name).copied());
        Self {
            joined_in: joined_in.collect(),
            joined: joined.into_iter().map(|(row, _)| row).collect(),
            rows,
        }
    }

    /// Returns what `ask` says of a row in each column.
    pub(super) fn of<T: Copy>(
        &self,
        reach: &Reach,
        from: &Row,
        mut ask: impl FnMut(&Row) -> T,
    ) -> OfColumns<T> {
        let own = self.rows.iter().position(|to| to.name == from.name);
        let own = own.and_then(|index| Some((index, ask(self.rows.get(index)?))));
        if reach.depends_on_nodes(from) {
            let all = self.rows.iter().map(ask).collect();
            return OfColumns { all, own };
        }
        let joined: Vec<T> = self.joined.iter().map(ask).collect();
        let all = self.joined_in.iter();
        let all = all.filter_map(|index| joined.get(*index).copied());
        OfColumns {
            all: all.collect(),
            own,
        }
    }

    /// Returns the same with what is said of the row in its own column in its place.
    pub fn each<T: Copy>(&self, reach: &Reach, from: &Row, ask: impl FnMut(&Row) -> T) -> Vec<T> {
        let OfColumns { mut all, own } = self.of(reach, from, ask);
        if let Some((index, own)) = own
            && let Some(at) = all.get_mut(index)
        {
            *at = own;
        }
        all
    }
}
