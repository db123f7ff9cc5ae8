//! Outcomes of work on the engines.

/// The result of [`Controller::handle`](super::Controller::handle).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Lists are not complete; nothing was written.
    Waiting,
    /// The tables are being read; nothing was written yet.
    Comparing,
    /// The kernel holds the wanted rules.
    Synced,
    /// The kernel could not be read or written; retry after a pause.
    Failed,
}

/// Selects engines. They are written, fail and are retried independently.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Engines {
    /// The tables of services.
    pub services: bool,
    /// The tables of network policies.
    pub policies: bool,
}

impl Engines {
    /// Both engines.
    pub const ALL: Self = Self {
        services: true,
        policies: true,
    };
    /// Only services.
    pub const SERVICES: Self = Self {
        services: true,
        policies: false,
    };
}

/// The outcome of each engine; `None` if it was not selected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcomes {
    /// The tables of services.
    pub services: Option<Outcome>,
    /// The tables of network policies.
    pub policies: Option<Outcome>,
}

impl Outcomes {
    /// Returns whether an engine has this outcome.
    pub fn any(self, outcome: Outcome) -> bool {
        [self.services, self.policies].contains(&Some(outcome))
    }

    /// Returns the worse outcome of both.
    pub fn together(self) -> Outcome {
        let worse = [Outcome::Failed, Outcome::Waiting, Outcome::Comparing];
        let worst = worse.into_iter().find(|outcome| self.any(*outcome));
        worst.unwrap_or(Outcome::Synced)
    }
}
