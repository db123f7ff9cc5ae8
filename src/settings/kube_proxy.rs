//! Flags for compatibility with kube-proxy's command lines.
//!
//! The arguments of kube-proxy in a DaemonSet, a systemd unit or an installer work with nftlet as
//! well. Flags of other modes and of kube-proxy's log library are accepted with a warning
//! ([`Ignored`]).

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, FromArgMatches};

use super::Error;

/// Flags with a value.
const VALUES: [&str; 27] = [
    "boot-id-file",
    "config-sync-period",
    "feature-gates",
    "iptables-min-sync-period",
    "iptables-sync-period",
    "ipvs-exclude-cidrs",
    "ipvs-min-sync-period",
    "ipvs-scheduler",
    "ipvs-sync-period",
    "ipvs-tcp-timeout",
    "ipvs-tcpfin-timeout",
    "ipvs-udp-timeout",
    "kube-api-burst",
    "kube-api-content-type",
    "kube-api-qps",
    "log-backtrace-at",
    "log-dir",
    "log-file",
    "log-file-max-size",
    "log-flush-frequency",
    "log-json-info-buffer-size",
    "log-text-info-buffer-size",
    "machine-id-file",
    "proxy-port-range",
    "show-hidden-metrics-for-version",
    "stderrthreshold",
    "vmodule",
];

/// Flags that are true without a value.
const SWITCHES: [&str; 12] = [
    "add-dir-header",
    "alsologtostderr",
    "cleanup-ipvs",
    "ipvs-strict-arp",
    "iptables-localhost-nodeports",
    "log-json-split-stream",
    "log-text-split-stream",
    "logtostderr",
    "one-output",
    "profiling",
    "skip-headers",
    "skip-log-headers",
];

/// Names with underscores, as kube-proxy's log library writes its flags.
const UNDERLINED: [(&str, &str); 8] = [
    ("add-dir-header", "add_dir_header"),
    ("log-backtrace-at", "log_backtrace_at"),
    ("log-dir", "log_dir"),
    ("log-file", "log_file"),
    ("log-file-max-size", "log_file_max_size"),
    ("one-output", "one_output"),
    ("skip-headers", "skip_headers"),
    ("skip-log-headers", "skip_log_headers"),
];

/// The names of the given flags of kube-proxy that have no effect.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ignored(Vec<&'static str>);

impl Ignored {
    /// Returns whether a flag never has an effect.
    pub(crate) fn contains(flag: &str) -> bool {
        Self::all().any(|name| name == flag)
    }

    /// Returns the given flags, such as `--vmodule`.
    pub(crate) fn given(&self) -> Vec<String> {
        self.0.iter().map(|name| format!("--{name}")).collect()
    }

    fn all() -> impl Iterator<Item = &'static str> {
        VALUES.into_iter().chain(SWITCHES)
    }
}

impl clap::Args for Ignored {
    fn augment_args(command: Command) -> Command {
        let flag = |name: &'static str| {
            let flag = Arg::new(name).long(name).hide(true);
            let flag = flag.action(ArgAction::Append);
            match UNDERLINED.iter().find(|(dashed, _)| *dashed == name) {
                Some((_, underlined)) => flag.alias(*underlined),
                None => flag,
            }
        };
        let values = VALUES.into_iter().map(|name| flag(name).num_args(1));
        let switches = SWITCHES.into_iter().map(|name| {
            let flag = flag(name).num_args(0..=1).require_equals(true);
            flag.default_missing_value("true")
        });
        command.args(values.chain(switches))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Ignored {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = |name: &&str| matches.value_source(name) == Some(ValueSource::CommandLine);
        Ok(Self(Self::all().filter(given).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// The value of one `-v`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verbose {
    /// Raises the level by a number.
    More(u8),
    /// Sets the level.
    Level(u8),
}

impl Verbose {
    /// Parses what follows `-v`: nothing, more letters as in `-vvv`, or a verbosity of kube-proxy.
    pub(super) fn parse(text: &str) -> Result<Self, Error> {
        if text.bytes().all(|byte| byte == b'v') {
            let more = u8::try_from(text.len()).unwrap_or(u8::MAX);
            return Ok(Self::More(more.saturating_add(1)));
        }
        match text.trim().parse() {
            Ok(level) => Ok(Self::of_kube_proxy(level)),
            Err(_) => Err(Error::Verbosity(text.to_owned())),
        }
    }

    pub(super) fn of_kube_proxy(level: u32) -> Self {
        Self::Level(from_kube_proxy(level))
    }

    /// Returns the resulting level.
    pub(super) fn sum(all: &[Self]) -> u8 {
        all.iter().fold(0, |sum, one| match one {
            Self::More(levels) => sum.saturating_add(*levels),
            Self::Level(level) => *level,
        })
    }
}

/// Converts a verbosity of kube-proxy, usually 2, to the number of `-v` with about as many lines.
fn from_kube_proxy(level: u32) -> u8 {
    match level {
        0..=3 => 0,
        4..=5 => 1,
        6..=7 => 2,
        8.. => 3,
    }
}

/// Converts a number of `-v` to the verbosity of kube-proxy with about as many lines.
pub(super) fn to_kube_proxy(level: u8) -> u8 {
    match level {
        0 => 0,
        1 => 4,
        2 => 6,
        3.. => 8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verbosities_survive_being_written() {
        for level in 0..=3 {
            assert_eq!(from_kube_proxy(to_kube_proxy(level).into()), level);
        }
    }
}
