//! Tables and colours.

use std::io::{self, IsTerminal as _};

/// Colours, where the output is a terminal and NO_COLOR does not ask for none.
pub struct Style {
    colours: bool,
}

impl Style {
    pub fn for_output() -> Self {
        let asked_for_none = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self {
            colours: io::stdout().is_terminal() && !asked_for_none,
        }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colours {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    pub fn strong(&self, text: &str) -> String {
        self.paint("1", text)
    }

    pub fn faint(&self, text: &str) -> String {
        self.paint("2", text)
    }

    pub fn good(&self, text: &str) -> String {
        self.paint("32", text)
    }

    pub fn bad(&self, text: &str) -> String {
        self.paint("1;31", text)
    }
}

/// A cell of a table; the colour does not count for its width.
pub struct Cell {
    text: String,
    code: &'static str,
}

impl Cell {
    pub fn plain(text: &str) -> Self {
        Self {
            text: text.to_owned(),
            code: "",
        }
    }

    pub fn good(text: &str) -> Self {
        Self {
            code: "32",
            ..Self::plain(text)
        }
    }

    pub fn bad(text: &str) -> Self {
        Self {
            code: "1;31",
            ..Self::plain(text)
        }
    }

    pub fn failures(count: usize) -> Self {
        let text = count.to_string();
        if count == 0 {
            Self::good(&text)
        } else {
            Self::bad(&text)
        }
    }
}

/// A table that prints its rows as they come, so its widths are given.
pub struct Table<'a> {
    style: &'a Style,
    widths: Vec<i32>,
}

impl<'a> Table<'a> {
    /// Prints the heading. A negative width means that the column is aligned to the left.
    pub fn new(style: &'a Style, columns: &[(&str, i32)]) -> Self {
        let table = Self {
            style,
            widths: columns.iter().map(|(_, width)| *width).collect(),
        };
        let heading = columns.iter().map(|(name, _)| Cell {
            code: "1",
            ..Cell::plain(name)
        });
        table.row(&heading.collect::<Vec<_>>());
        table
    }

    pub fn row(&self, cells: &[Cell]) {
        let mut line = String::new();
        for (cell, &width) in cells.iter().zip(&self.widths) {
            let pad = " "
                .repeat((width.unsigned_abs() as usize).saturating_sub(cell.text.chars().count()));
            let text = if cell.code.is_empty() {
                cell.text.clone()
            } else {
                self.style.paint(cell.code, &cell.text)
            };
            let (before, after) = if width < 0 {
                ("", pad.as_str())
            } else {
                (pad.as_str(), "")
            };
            line.push_str(&format!("  {before}{text}{after}"));
        }
        println!("{}", line.trim_end());
    }
}
