//! Notices about the invalid fields of one object.

use std::fmt::Display;

use crate::model::{Kind, Notice, ObjectRef, Reason, Subject};

/// How many faults are reported one by one; a slice with a thousand wrong addresses is one mistake.
const MOST_DETAILS: usize = 8;

/// Collects the notices about one object.
pub(super) struct FieldReport {
    object: ObjectRef,
    notices: Vec<Notice>,
    beyond: usize,
}

impl FieldReport {
    pub(super) fn new(object: ObjectRef) -> Self {
        Self {
            object,
            notices: Vec::new(),
            beyond: 0,
        }
    }

    /// Reports that `value` of `field` was left out. `fault` completes the sentence: what is wrong
    /// with the value and how to correct it.
    pub(super) fn left_out(
        &mut self,
        field: impl Display,
        value: impl Display,
        fault: impl Display,
    ) {
        if self.notices.len() < MOST_DETAILS {
            let message = format!("{}: {field} \"{value}\" {fault}", self.object);
            self.push(message);
        } else {
            self.beyond += 1;
        }
    }

    /// Returns the notices. The last one counts the faults that were not reported one by one.
    pub(super) fn finish(mut self) -> Vec<Notice> {
        if self.beyond > 0 {
            let message = format!("{}: {} more invalid fields", self.object, self.beyond);
            self.push(message);
        }
        self.notices
    }

    fn push(&mut self, message: String) {
        self.notices.push(Notice {
            subject: Subject::Object(self.object.clone()),
            reason: match self.object.kind {
                Kind::NetworkPolicy => Reason::InvalidPolicy,
                _ => Reason::InvalidField,
            },
            message,
        });
    }
}
