//! The differences as Markdown, for a pull request.

use std::io::{self, Write};

use super::Diff;
use super::sections::{compared, notes, sections, summary};

/// The most rows of a table that is not folded.
const MOST_ROWS: usize = 10;

/// Writes the differences. Names come from anyone who may create objects, and are escaped.
pub(crate) fn markdown(diff: &Diff, out: &mut dyn Write) -> io::Result<()> {
    let sections = sections(diff);
    writeln!(out, "### nftlet: {}\n", summary(&sections))?;
    writeln!(out, "{}", compared(diff, escaped))?;
    for section in &sections {
        let is_long = section.rows.len() > MOST_ROWS;
        if is_long {
            let (title, count) = (section.title, &section.count);
            writeln!(out, "\n<details><summary>{title}: {count}</summary>")?;
        } else {
            writeln!(out, "\n**{}**", section.title)?;
        }
        let header = section.header.iter().map(|title| in_words(title));
        writeln!(out, "\n| {} |", header.collect::<Vec<_>>().join(" | "))?;
        writeln!(out, "|{}", "---|".repeat(section.header.len()))?;
        for row in &section.rows {
            let cells = row.cells.iter().map(|cell| escaped(cell));
            writeln!(out, "| {} |", cells.collect::<Vec<_>>().join(" | "))?;
        }
        if is_long {
            writeln!(out, "\n</details>")?;
        }
    }
    for note in notes(diff) {
        writeln!(out, "\n{}", escaped(&note))?;
    }
    Ok(())
}

/// Returns a title of a table with one capital.
fn in_words(title: &str) -> String {
    let mut letters = title.chars();
    let first = letters.next().map(String::from).unwrap_or_default();
    first + &letters.as_str().to_lowercase()
}

/// Escapes what Markdown gives a meaning to.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        match c {
            // A backslash does not keep GitHub from notifying people, or from linking to issues.
            '@' | '#' | '<' | '>' | '&' => escaped.push_str(&format!("&#{};", u32::from(c))),
            '\\' | '`' | '*' | '_' | '{' | '}' | '[' | ']' | '|' | '~' | '!' => {
                escaped.push('\\');
                escaped.push(c);
            }
            c if c.is_control() => escaped.push(' '),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_no_meaning_in_markdown() {
        for (text, wanted) in [
            ("shop/web-0", "shop/web-0"),
            ("a|b\nc", "a\\|b c"),
            ("<img src=x>", "&#60;img src=x&#62;"),
            (
                "@team #12 `x` [y](z)",
                "&#64;team &#35;12 \\`x\\` \\[y\\](z)",
            ),
            ("&lt;", "&#38;lt;"),
        ] {
            assert_eq!(escaped(text), wanted);
        }
    }
}
