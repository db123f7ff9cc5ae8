//! The differences as people read them on a terminal.

use std::io::{self, Write};

use super::Diff;
use super::objects::Change;
use super::sections::{compared, notes, sections, summary};
use crate::insight::answer::Verdict;
use crate::insight::text::{Style, table};

/// Writes the differences.
pub(crate) fn text(diff: &Diff, style: Style, out: &mut dyn Write) -> io::Result<()> {
    let sections = sections(diff);
    let compared = compared(diff, str::to_owned);
    writeln!(out, "{compared}: {}", summary(&sections))?;
    for section in &sections {
        writeln!(out, "\n{}", section.title)?;
        let header = section.header.iter().map(|title| (*title).to_owned());
        let rows = section.rows.iter().map(|row| row.cells.clone());
        let cells: Vec<Vec<String>> = [header.collect()].into_iter().chain(rows).collect();
        let change = |index: usize| Some(verdict_of(section.rows.get(index)?.change));
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = table(&cells, style, change, &mut text);
        for line in text.lines() {
            writeln!(out, "  {line}")?;
        }
    }
    for (index, note) in notes(diff).enumerate() {
        if index == 0 {
            writeln!(out)?;
        }
        writeln!(out, "{note}")?;
    }
    Ok(())
}

/// Returns the verdict whose colour a change has.
fn verdict_of(change: Change) -> Verdict {
    match change {
        Change::Added => Verdict::Allowed,
        Change::Removed => Verdict::Denied,
        Change::Changed => Verdict::Partly,
    }
}
