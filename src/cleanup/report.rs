//! What was removed, and what was not.

use std::fmt;

use super::error::Error;

/// The result of one cleanup pass. Its text is the list of what was removed, in two columns.
#[derive(Debug, Default)]
pub(crate) struct CleanupReport {
    removed: Vec<(String, String)>,
    notes: Vec<String>,
    failures: Vec<Error>,
}

impl CleanupReport {
    pub(super) fn removed(&mut self, what: impl Into<String>, place: impl Into<String>) {
        self.removed.push((what.into(), place.into()));
    }

    /// Adds advice for the administrator.
    pub(super) fn note(&mut self, note: String) {
        self.notes.push(note);
    }

    pub(super) fn fail(&mut self, error: impl Into<Error>) {
        self.failures.push(error.into());
    }

    /// Returns what was removed, and where it was.
    pub(crate) fn removals(&self) -> impl Iterator<Item = (&str, &str)> {
        self.removed
            .iter()
            .map(|(what, place)| (what.as_str(), place.as_str()))
    }

    pub(crate) fn notes(&self) -> &[String] {
        &self.notes
    }

    pub(crate) fn failures(&self) -> &[Error] {
        &self.failures
    }
}

impl fmt::Display for CleanupReport {
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

/// Returns a number of things, such as `3 chains`.
pub(super) fn counted(number: usize, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {what}{plural}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_aligned() {
        let mut report = CleanupReport::default();
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
