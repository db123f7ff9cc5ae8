//! Notices about files.

use std::path::Path;

use super::documents::Position;
use crate::model::{Notice, Reason, Subject};

/// Creates a notice about a file, or a position in it.
pub(super) fn file_notice(
    path: &Path,
    at: Option<Position>,
    reason: Reason,
    message: String,
) -> Notice {
    Notice {
        subject: Subject::File {
            path: path.to_owned(),
            position: at.map(|at| (at.line, at.column)),
        },
        reason,
        message,
    }
}
