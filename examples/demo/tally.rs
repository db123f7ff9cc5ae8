//! Counts answers and failures of requests.

use std::collections::BTreeMap;
use std::io;

use crate::Outcome;
use crate::netns::Answer;

/// Answers by pod, and failures.
#[derive(Default)]
pub struct Tally {
    answers: BTreeMap<String, usize>,
    pub failed: usize,
    pub example: Option<String>,
}

impl Tally {
    pub fn count(&mut self, answer: io::Result<Answer>) {
        match answer {
            Ok(answer) => *self.answers.entry(answer.name).or_default() += 1,
            Err(error) => {
                self.failed += 1;
                self.example.get_or_insert(error.to_string());
            }
        }
    }

    pub fn of(&self, pod: &str) -> usize {
        self.answers.get(pod).copied().unwrap_or(0)
    }

    pub fn total(&self) -> usize {
        self.answers.values().sum::<usize>() + self.failed
    }

    /// Returns the share of a pod in the answers, as text.
    pub fn share(&self, pod: &str) -> String {
        match self.of(pod) {
            0 => "-".to_owned(),
            count => format!("{:.0} %", 100.0 * count as f64 / self.total() as f64),
        }
    }

    /// Returns an error if requests failed, or if other pods answered than expected.
    pub fn check(&self, what: &str, expected: &[&str]) -> Outcome<()> {
        if self.failed > 0 {
            let example = self.example.as_deref().unwrap_or_default();
            return Err(format!(
                "{} of {} requests to {what} failed: {example}",
                self.failed,
                self.total()
            )
            .into());
        }
        let others: Vec<_> = self
            .answers
            .keys()
            .filter(|pod| !expected.contains(&pod.as_str()))
            .collect();
        if !others.is_empty() {
            return Err(format!("{what} was answered by {others:?}, which do not serve it").into());
        }
        // Each is expected to have a third; half of that is many standard deviations away.
        let fair = self.total() / expected.len();
        if let Some(pod) = expected.iter().find(|pod| self.of(pod) < fair / 2) {
            let got = self.of(pod);
            return Err(
                format!("{what}: {pod} got only {got} of {} requests", self.total()).into(),
            );
        }
        Ok(())
    }
}
