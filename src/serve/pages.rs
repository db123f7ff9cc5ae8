//! The pages that show how nftlet was started: `/configz`, `/flagz` and `/statusz`.
//!
//! They have the format of Kubernetes' components. `/configz` is JSON with the field names of
//! v1alpha1; the other two are for people, and their format may change.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde_json::Value;

use super::http::Router;

const FOR_PEOPLE: &str = "Warning: this page is for people; its form may change at any time.";

/// The contents of the pages.
pub(crate) struct Pages {
    configuration: Value,
    flags: String,
    started: Timestamp,
    clock: Instant,
}

impl Pages {
    /// Creates the pages from the configuration and the names and values of the flags. The uptime
    /// counts from now.
    pub(crate) fn new(
        configuration: Value,
        values: impl IntoIterator<Item = (String, String)>,
    ) -> Self {
        let mut flags = format!("\nnftlet flags\n{FOR_PEOPLE}\n\n");
        for (name, value) in values {
            // Writing to a string does not fail.
            let _ = writeln!(flags, "{name}={value}");
        }
        Self {
            configuration,
            flags,
            started: Timestamp::now(),
            clock: Instant::now(),
        }
    }

    /// Adds the pages to `router`.
    pub(crate) fn on(&self, router: Router) -> Router {
        let (configuration, flags) = (self.configuration.to_string(), self.flags.clone());
        let router = router
            .json("/configz", move || configuration.clone())
            .text("/flagz", move || flags.clone());
        let paths: Vec<&str> = router.paths().chain(["/statusz"]).collect();
        let paths = paths.join(" ");
        let (started, clock) = (self.started, self.clock);
        router.text("/statusz", move || {
            status(&started.to_string(), clock.elapsed(), &paths)
        })
    }
}

fn status(started: &str, up: Duration, paths: &str) -> String {
    let seconds = up.as_secs();
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!(
        "\nnftlet statusz\n{FOR_PEOPLE}\n\nStarted: {started}\nUp: {hours} hr {minutes:02} min \
         {seconds:02} sec\nBinary version: {}\nPaths: {paths}\n",
        env!("CARGO_PKG_VERSION")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_has_the_lines_of_kubernetes_components() {
        let text = status("2026-01-01T00:00:00Z", Duration::from_secs(3_725), "/a /b");
        for line in [
            "Started: 2026-01-01T00:00:00Z",
            "Up: 1 hr 02 min 05 sec",
            concat!("Binary version: ", env!("CARGO_PKG_VERSION")),
            "Paths: /a /b",
        ] {
            assert!(text.lines().any(|it| it == line), "{line}: {text}");
        }
    }
}
