//! Tables and colours.

use std::io::{self, IsTerminal as _};
use std::net::IpAddr;

/// The machines and their addresses.
pub const PICTURE: [&str; 3] = [
    "client                       node-1                 ┌── pod-1  10.244.1.11  fd00:10:244:1::11",
    "192.168.10.100        ─────  192.168.10.1        ───┼── pod-2  10.244.1.12  fd00:10:244:1::12",
    "fd00:192:168:10::100         fd00:192:168:10::1     └── pod-3  10.244.1.13  fd00:10:244:1::13",
];

pub fn family(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "IPv4" } else { "IPv6" }
}

/// Colours, if the output is a terminal and NO_COLOR is not set.
pub struct Style {
    colours: bool,
}

impl Style {
    pub fn for_output() -> Self {
        let no_colours = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self {
            colours: io::stdout().is_terminal() && !no_colours,
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

/// A cell of a table; its colour does not count for the width.
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

/// A table of given widths, which prints each row at once.
pub struct Table<'a> {
    style: &'a Style,
    widths: Vec<i32>,
}

impl<'a> Table<'a> {
    /// Prints the heading. A column with a negative width is aligned to the left.
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
