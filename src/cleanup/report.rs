//! What was removed, and what was not.

use std::fmt;

use super::error::Error;

/// What became of a cleanup.
#[derive(Debug, Default)]
pub struct Report {
    removed: Vec<(String, String)>,
    notes: Vec<String>,
    failures: Vec<Error>,
}

impl Report {
    /// Notes that something is gone, and from where.
    pub(super) fn removed(&mut self, what: impl Into<String>, place: impl Into<String>) {
        self.removed.push((what.into(), place.into()));
    }

    /// Notes something that a person should know.
    pub(super) fn note(&mut self, note: String) {
        self.notes.push(note);
    }

    /// Notes that something stays.
    pub(super) fn fail(&mut self, error: impl Into<Error>) {
        self.failures.push(error.into());
    }

    /// What is gone, and where it was.
    pub fn removals(&self) -> impl Iterator<Item = (&str, &str)> {
        self.removed
            .iter()
            .map(|(what, place)| (what.as_str(), place.as_str()))
    }

    /// What a person should know besides.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Why something stays that should have gone.
    pub fn failures(&self) -> &[Error] {
        &self.failures
    }
}

/// What is gone as a list in two columns.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const WHAT: &str = "REMOVED";
        if self.removed.is_empty() {
            return f.write_str("nothing to remove\n");
        }
        let widths = self.removed.iter().map(|(what, _)| what.chars().count());
        let width = widths.max().unwrap_or_default().max(WHAT.len());
        writeln!(f, "{WHAT:width$}  WHERE")?;
        for (what, place) in &self.removed {
            writeln!(f, "{what:width$}  {place}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_aligned() {
        let mut report = Report::default();
        assert_eq!(report.to_string(), "nothing to remove\n");
        report.removed("table ip nftlet", "nftables");
        report.removed("3 chains of kube-proxy", "iptables-nft, table nat");
        let expected = "\
REMOVED                 WHERE
table ip nftlet         nftables
3 chains of kube-proxy  iptables-nft, table nat
";
        assert_eq!(report.to_string(), expected);
    }
}
