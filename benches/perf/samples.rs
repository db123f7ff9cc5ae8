//! Many measurements of one quantity.

/// Measurements of one quantity.
#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<f64>);

impl FromIterator<f64> for Samples {
    fn from_iter<I: IntoIterator<Item = f64>>(samples: I) -> Self {
        Self(samples.into_iter().collect())
    }
}

impl Samples {
    pub fn push(&mut self, sample: f64) {
        self.0.push(sample);
    }

    /// Adds those of another one.
    pub fn append(&mut self, mut other: Self) {
        self.0.append(&mut other.0);
    }

    /// Returns how many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted
    }

    /// Returns the smallest that so many percent do not exceed; zero without samples.
    pub fn percentile(&self, percent: usize) -> f64 {
        let rank = (self.0.len() * percent).div_ceil(100);
        let found = self.sorted().get(rank.saturating_sub(1)).copied();
        found.unwrap_or_default()
    }

    /// Returns the middle one.
    pub fn median(&self) -> f64 {
        self.percentile(50)
    }

    /// Returns the largest one.
    pub fn largest(&self) -> f64 {
        self.percentile(100)
    }

    /// Returns the 99th percentile, if there are samples enough.
    pub fn p99(&self) -> Option<f64> {
        (self.0.len() >= 100).then(|| self.percentile(99))
    }

    /// Returns the arithmetic mean; zero without samples.
    pub fn mean(&self) -> f64 {
        self.0.iter().sum::<f64>() / self.0.len().max(1) as f64
    }

    /// Returns the ratios to the samples of another one in the same places.
    pub fn over(&self, other: &Self) -> Self {
        let pairs = self.0.iter().zip(&other.0);
        pairs.map(|(one, other)| one / other).collect()
    }

    /// Returns the samples between which the true median is with a probability of 95 %: those as
    /// many ranks away as twice the standard deviation of a fair coin's heads.
    pub fn bounds_of_median(&self) -> [f64; 2] {
        let sorted = self.sorted();
        let away = (sorted.len() as f64).sqrt().ceil() as usize;
        let middle = sorted.len() / 2;
        let most = sorted.len().saturating_sub(1);
        let at = |rank: usize| sorted.get(rank.min(most)).copied().unwrap_or_default();
        [at(middle.saturating_sub(away)), at(middle + away)]
    }
}
