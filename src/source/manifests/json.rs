//! Finding places in JSON text.

use serde_json::value::RawValue;

use super::tree::Position;

/// Tells where in a text a part of it begins; asked in the order of the text, it walks the text
/// once.
pub(super) struct Locator<'a> {
    text: &'a str,
    offset: usize,
    at: Position,
}

impl<'a> Locator<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self {
            text,
            offset: 0,
            at: Position { line: 1, column: 1 },
        }
    }

    /// The place of a value that was borrowed from the text.
    pub(super) fn position_of(&mut self, raw: &RawValue) -> Position {
        let start = raw.get().as_ptr().addr();
        let offset = start.saturating_sub(self.text.as_ptr().addr());
        if offset < self.offset {
            *self = Self::new(self.text);
        }
        for byte in self.text.bytes().take(offset).skip(self.offset) {
            if byte == b'\n' {
                self.at.line += 1;
                self.at.column = 1;
            } else {
                self.at.column += 1;
            }
        }
        self.offset = offset;
        self.at
    }
}

impl Position {
    /// The place of a fault inside a value that begins here.
    pub(super) fn of_fault(self, fault: &serde_json::Error) -> Position {
        let (line, column) = (fault.line() as u64, fault.column() as u64);
        match line {
            0 => self,
            1 => Position {
                line: self.line,
                column: self.column + column.saturating_sub(1),
            },
            _ => Position {
                line: self.line + line - 1,
                column,
            },
        }
    }
}

/// What a fault says, without the place, which counts from the beginning of the value alone.
pub(super) fn without_place(fault: &serde_json::Error) -> String {
    let text = fault.to_string();
    let place = format!(" at line {} column {}", fault.line(), fault.column());
    text.strip_suffix(&place).map(str::to_owned).unwrap_or(text)
}
