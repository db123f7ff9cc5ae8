//! The command line as it was given: the flags with their values, and which of them were there.
//!
//! Which flags were given matters beside a configuration file, and the page `/flagz` shows all
//! values. The subcommands print something and have nothing to do with the flags.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::io::{self, Write};

use clap::error::{ContextKind, ContextValue};
use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory, FromArgMatches, Subcommand};
use clap_complete::Shell;

use super::{Ignored, Settings};

/// The flags whose settings are in a KubeProxyConfiguration too. Beside `--config` they are
/// ignored, as kube-proxy ignores them.
const IN_FILE: [&str; 23] = [
    "bind_address",
    "bind_address_hard_fail",
    "cluster_cidr",
    "conntrack_max_per_core",
    "conntrack_min",
    "conntrack_tcp_be_liberal",
    "conntrack_tcp_timeout_close_wait",
    "conntrack_tcp_timeout_established",
    "conntrack_udp_timeout",
    "conntrack_udp_timeout_stream",
    "detect_local_mode",
    "healthz_bind_address",
    "healthz_port",
    "kubeconfig",
    "masquerade_all",
    "masquerade_bit",
    "metrics_bind_address",
    "metrics_port",
    "nodeport_addresses",
    "oom_score_adj",
    "pod_bridge_interface",
    "pod_interface_name_prefix",
    "proxy_mode",
];

/// What is printed instead of doing any work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// Print a script with which a shell completes nftlet's flags.
    Completion {
        /// The shell.
        #[arg(value_name = "bash|zsh|fish")]
        shell: Shell,
    },
    /// Print the manual page, for `man -l -`.
    Man,
}

impl Command {
    /// Prints it.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn print(self, out: &mut impl Write) -> io::Result<()> {
        let mut nftlet = Settings::command();
        match self {
            Self::Completion { shell } => {
                let mut script = Vec::new();
                clap_complete::generate(shell, &mut nftlet, "nftlet", &mut script);
                out.write_all(&script)
            }
            Self::Man => clap_mangen::Man::new(nftlet).render(out),
        }
    }
}

/// A parsed command line.
#[derive(Clone, Debug)]
pub struct CommandLine {
    /// The values, defaults included.
    pub args: Settings,
    given: BTreeSet<String>,
    values: BTreeMap<String, String>,
}

impl CommandLine {
    /// Parses the arguments, of which the first is the name of the program.
    ///
    /// # Errors
    ///
    /// Those of the arguments, and the requests for help and the version.
    pub fn parse(
        arguments: impl IntoIterator<Item = impl Into<OsString> + Clone>,
    ) -> Result<Self, clap::Error> {
        let command = Settings::command();
        let matches = command.clone().try_get_matches_from(arguments)?;
        let args = Settings::from_arg_matches(&matches)?;
        let (mut given, mut values) = (BTreeSet::new(), BTreeMap::new());
        for argument in command.get_arguments() {
            let (id, name) = (argument.get_id().as_str(), argument.get_long());
            if matches.value_source(id) == Some(ValueSource::CommandLine) {
                given.insert(id.to_owned());
            }
            if Ignored::contains(id) && !given.contains(id) {
                continue;
            }
            values.insert(name.unwrap_or(id).to_owned(), shown(&matches, id));
        }
        Ok(Self {
            args,
            given,
            values,
        })
    }

    /// Whether a flag was given; by its name in [`Settings`].
    pub fn is_given(&self, flag: &str) -> bool {
        self.given.contains(flag)
    }

    /// The flags that a configuration file makes ineffective, as they are written.
    pub fn overruled(&self) -> Vec<String> {
        let covered = IN_FILE.iter().filter(|flag| self.is_given(flag));
        covered
            .map(|flag| format!("--{}", flag.replace('_', "-")))
            .collect()
    }

    /// All flags with their values, defaults included, sorted by name.
    pub fn values(&self) -> &BTreeMap<String, String> {
        &self.values
    }
}

/// The value of a flag as one would write it.
fn shown(matches: &ArgMatches, id: &str) -> String {
    let Ok(Some(raw)) = matches.try_get_raw(id) else {
        return String::new();
    };
    let texts: Vec<_> = raw.map(|value| value.to_string_lossy()).collect();
    texts.join(",")
}

/// The error in one line: what is wrong, and what may have been meant.
pub fn one_line(error: &clap::Error) -> String {
    let rendered = error.render().to_string();
    let mut line = rendered.lines().next().unwrap_or_default().to_owned();
    let meant = [ContextKind::SuggestedArg, ContextKind::SuggestedValue]
        .into_iter()
        .find_map(|kind| error.get(kind));
    let meant = match meant {
        Some(ContextValue::String(one)) => Some(one.clone()),
        Some(ContextValue::Strings(some)) => some.first().cloned(),
        _ => None,
    };
    if let Some(meant) = meant {
        line.push_str(&format!("; did you mean {meant}?"));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Flags that only nftlet has, and those of kube-proxy that are not in its configuration.
    const NOT_IN_FILE: [&str; 17] = [
        "allow_empty",
        "cleanup",
        "config",
        "dry_run",
        "help",
        "hostname_override",
        "init_only",
        "keep_kube_proxy",
        "log_denied",
        "log_format",
        "manifests",
        "master",
        "network_policy",
        "network_policy_strict",
        "once",
        "verbose",
        "write_config_to",
    ];

    fn parsed(args: &[&str]) -> CommandLine {
        let all = ["nftlet"].iter().chain(args);
        CommandLine::parse(all).unwrap_or_else(|error| panic!("{args:?}: {error}"))
    }

    #[test]
    fn every_flag_is_known_to_be_in_the_file_or_not() {
        for argument in Settings::command().get_arguments() {
            let id = argument.get_id().as_str();
            if Ignored::contains(id) {
                continue;
            }
            let in_file = IN_FILE.contains(&id);
            assert!(
                in_file != NOT_IN_FILE.contains(&id),
                "{id}: is it a setting of KubeProxyConfiguration?"
            );
        }
        for id in IN_FILE {
            let known = Settings::command()
                .get_arguments()
                .any(|arg| arg.get_id() == id);
            assert!(known, "there is no {id}");
        }
    }

    #[test]
    fn what_a_file_overrules_is_named_as_it_was_written() {
        let line = parsed(&[
            "--cluster-cidr=10.0.0.0/8",
            "--hostname-override=a",
            "--masquerade-all",
        ]);
        assert_eq!(line.overruled(), ["--cluster-cidr", "--masquerade-all"]);
        assert!(line.is_given("hostname_override") && !line.is_given("verbose"));
        assert!(parsed(&[]).overruled().is_empty());
    }

    #[test]
    fn all_flags_have_a_value_to_show() {
        let line = parsed(&["--manifests=a", "--manifests=b", "-vv", "--dry-run"]);
        let value = |name: &str| line.values()[name].as_str();
        assert_eq!(value("manifests"), "a,b");
        assert_eq!(value("dry-run"), "true");
        assert_eq!(value("once"), "false");
        assert_eq!(value("detect-local-mode"), "ClusterCIDR");
        assert_eq!(value("cluster-cidr"), "");
    }

    #[test]
    fn errors_are_one_line_with_what_was_meant() {
        for (args, wanted) in [
            (
                &["--manifest=x"][..],
                "error: unexpected argument '--manifest' found; did you mean --manifests?",
            ),
            (
                &["--unheard-of"],
                "error: unexpected argument '--unheard-of' found",
            ),
            (
                &["--dry-run", "--once"],
                "error: the argument '--dry-run' cannot be used with '--once'",
            ),
        ] {
            let all = ["nftlet"].iter().chain(args);
            let error = CommandLine::parse(all).unwrap_err();
            assert_eq!(one_line(&error), wanted);
        }
    }

    #[test]
    fn scripts_and_the_manual_name_the_flags() {
        for (args, part) in [
            (&["completion", "bash"][..], "--cluster-cidr"),
            (&["completion", "zsh"], "--cluster-cidr"),
            (&["completion", "fish"], "-l cluster-cidr"),
            (&["man"], "cluster\\-cidr"),
        ] {
            let command = parsed(args).args.command.expect("a subcommand");
            let mut text = Vec::new();
            command.print(&mut text).expect("it is written");
            let text = String::from_utf8(text).expect("UTF-8");
            assert!(text.contains(part), "{args:?}: {text}");
        }
        let all = ["nftlet", "--once", "man"];
        assert!(CommandLine::parse(all).is_err(), "flags and a subcommand");
    }
}
