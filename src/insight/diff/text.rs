//! The differences as people read them on a terminal.

use std::io::{self, Write};

use super::Diff;
use super::objects::Change;
use super::sections::{Section, compared, notes, sections, summary};
use crate::insight::answer::Verdict;
use crate::insight::text::Style;

/// Writes the differences.
pub(crate) fn text(diff: &Diff, style: Style, out: &mut dyn Write) -> io::Result<()> {
    let sections = sections(diff);
    let compared = compared(diff, str::to_owned);
    writeln!(out, "{compared}: {}", summary(&sections))?;
    for section in &sections {
        writeln!(out, "\n{}", section.title)?;
        table(section, style, out)?;
    }
    for (index, note) in notes(diff).enumerate() {
        if index == 0 {
            writeln!(out)?;
        }
        writeln!(out, "{note}")?;
    }
    Ok(())
}

fn table(section: &Section, style: Style, out: &mut dyn Write) -> io::Result<()> {
    let mut widths: Vec<usize> = section.header.iter().map(|title| title.len()).collect();
    for row in &section.rows {
        for (width, cell) in widths.iter_mut().zip(&row.cells) {
            *width = cell.chars().count().max(*width);
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded = cells.zip(&widths);
        let padded = padded.map(|(cell, width)| format!("  {cell:<width$}"));
        padded.collect::<String>().trim_end().to_owned()
    };
    writeln!(out, "{}", line(&mut section.header.iter().copied()))?;
    for row in &section.rows {
        let (open, close) = style.around(match row.change {
            Change::Added => Verdict::Allowed,
            Change::Removed => Verdict::Denied,
            Change::Changed => Verdict::Partly,
        });
        let cells = line(&mut row.cells.iter().map(|cell| &**cell));
        writeln!(out, "{open}{cells}{close}")?;
    }
    Ok(())
}
