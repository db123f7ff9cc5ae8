//! Collecting what is wrong with one object.

use std::fmt::Display;

use crate::model::{Kind, Notice, ObjectRef, Reason, Subject};

/// The most faults that are told one by one; a slice of a thousand wrong addresses is one
/// mistake, not a thousand.
const MOST_DETAILS: usize = 8;

/// The notices about one object.
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

    /// Notes that `value` of `field` was left out; `fault` tells what is wrong with it and how to
    /// mend it.
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

    /// The notices, ending with a count of those that were not spelled out.
    pub(super) fn finish(mut self) -> Vec<Notice> {
        if self.beyond > 0 {
            let message = format!("{}: {} more faults of this kind", self.object, self.beyond);
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
