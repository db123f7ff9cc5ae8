//! Makes foreign texts safe for a line of the log.

use std::borrow::Cow;
use std::fmt::Write as _;

/// Escapes the control characters of a text as JSON does, and removes user names and passwords from
/// its URLs. With `colours`, keeps the sequences that set colours.
pub(super) fn safe(text: &str, colours: bool) -> Cow<'_, str> {
    match without_users(text) {
        Cow::Borrowed(text) => without_controls(text, colours),
        Cow::Owned(text) => Cow::Owned(without_controls(&text, colours).into_owned()),
    }
}

fn without_controls(text: &str, colours: bool) -> Cow<'_, str> {
    if !text.contains(is_control) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    let mut rest = text;
    while let Some(at) = rest.find(is_control) {
        let (before, from) = rest.split_at(at);
        out.push_str(before);
        if let Some((colour, behind)) = colour(from).filter(|_| colours) {
            out.push_str(colour);
            rest = behind;
            continue;
        }
        let mut chars = from.chars();
        match chars.next() {
            Some('\n') => out.push_str("\\n"),
            Some('\r') => out.push_str("\\r"),
            Some('\t') => out.push_str("\\t"),
            // Writing to a string does not fail.
            Some(other) => drop(write!(out, "\\u{:04x}", u32::from(other))),
            None => {}
        }
        rest = chars.as_str();
    }
    out.push_str(rest);
    Cow::Owned(out)
}

/// Returns whether a character ends lines, moves the cursor or changes the direction of text.
fn is_control(c: char) -> bool {
    c.is_control() || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Splits off a sequence at the start of a text that sets only colours and attributes.
fn colour(text: &str) -> Option<(&str, &str)> {
    let inside = text.strip_prefix("\x1b[")?;
    let behind = inside.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';');
    let behind = behind.strip_prefix('m')?;
    text.split_at_checked(text.len() - behind.len())
}

/// Removes `user:password@` from the URLs of a text.
fn without_users(text: &str) -> Cow<'_, str> {
    const BEGIN: &str = "://";
    if !text.contains(BEGIN) {
        return Cow::Borrowed(text);
    }
    let ends = |c: char| c.is_whitespace() || is_control(c) || "/?#\\\"`<>".contains(c);
    let mut parts = text.split(BEGIN);
    let mut out = parts.next().unwrap_or_default().to_owned();
    for url in parts {
        let (authority, path) = url.split_at(url.find(ends).unwrap_or(url.len()));
        let host = authority.rsplit('@').next().unwrap_or_default();
        out.extend([BEGIN, host, path]);
    }
    Cow::Owned(out)
}
