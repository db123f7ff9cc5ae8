//! Notices about the invalid fields of one object.

use std::fmt::Display;

use crate::model::{Kind, Notice, ObjectRef, Reason, Subject};

/// How many faults are reported one by one; a slice with a thousand wrong addresses is one mistake.
const MOST_DETAILS: usize = 8;

/// Collects the notices about one object.
pub(super) struct FieldReport {
    object: ObjectRef,
    faults: Vec<(Reason, String)>,
    beyond: usize,
}

impl FieldReport {
    pub(super) fn new(object: ObjectRef) -> Self {
        Self {
            object,
            faults: Vec::new(),
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
        let reason = match self.object.kind {
            Kind::NetworkPolicy | Kind::ClusterNetworkPolicy => Reason::InvalidPolicy,
            _ => Reason::InvalidField,
        };
        self.add(reason, format!("{field} \"{value}\" {fault}"));
    }

    /// Reports that `field` is valid but not supported. `consequence` completes the sentence.
    pub(super) fn unsupported(&mut self, field: impl Display, consequence: impl Display) {
        let fault = format!("{field} is not supported; {consequence}");
        self.add(Reason::UnsupportedField, fault);
    }

    fn add(&mut self, reason: Reason, fault: String) {
        if self.faults.len() < MOST_DETAILS {
            self.faults.push((reason, fault));
        } else {
            self.beyond += 1;
        }
    }

    /// Returns the first fault, for the error about an object that cannot be used.
    pub(super) fn into_first_fault(self) -> String {
        let first = self.faults.into_iter().next();
        first.map_or_else(String::new, |(_, fault)| fault)
    }

    /// Returns the notices. The last one counts the faults that were not reported one by one.
    pub(super) fn finish(mut self) -> Vec<Notice> {
        if self.beyond > 0 {
            let reason = self.faults.last().map(|(reason, _)| *reason);
            let beyond = format!("{} more invalid fields", self.beyond);
            self.faults
                .push((reason.unwrap_or(Reason::InvalidField), beyond));
        }
        let notice = |(reason, fault)| Notice {
            subject: Subject::Object(self.object.clone()),
            reason,
            message: format!("{}: {fault}", self.object),
        };
        self.faults.into_iter().map(notice).collect()
    }
}
