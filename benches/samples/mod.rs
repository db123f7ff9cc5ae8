//! Many measurements of one thing, and what stands for them.

#![allow(dead_code, reason = "each benchmark uses its own part")]

/// Measurements of one thing.
#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Adds one.
    pub fn push(&mut self, sample: f64) {
        self.0.push(sample);
    }

    /// The smallest that so many percent of all do not exceed.
    pub fn percentile(&self, percent: usize) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (sorted.len() * percent).div_ceil(100);
        let found = sorted.get(rank.saturating_sub(1));
        *found.expect("something was measured")
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Their arithmetic mean.
    pub fn mean(&self) -> f64 {
        assert!(!self.0.is_empty(), "something was measured");
        self.0.iter().sum::<f64>() / self.0.len() as f64
    }

    /// The largest one.
    pub fn largest(&self) -> f64 {
        self.percentile(100)
    }

    /// The middle one.
    pub fn median(&self) -> f64 {
        self.percentile(50)
    }
}
