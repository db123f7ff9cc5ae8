//! The command line: the values of the flags, and which of them were given.
//!
//! A configuration file overrules most flags that were given, and the page `/flagz` shows all
//! values. The subcommands print something. Those that answer questions take the flags of the agent
//! on which the answer depends.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, Write};

use clap::error::{ContextKind, ContextValue};
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Subcommand};
use clap_complete::Shell;

use super::commands::Command;
use super::file::FIELDS;
use super::{Ignored, Settings};

/// The subcommands that answer questions.
const QUESTIONS: [&str; 7] = [
    "audit", "diff", "explain", "policies", "reach", "services", "status",
];

/// The flags that the help of these subcommands shows, by their names in [`Settings`].
const OF_QUESTIONS: [&str; 18] = [
    "socket",
    "config",
    "kubeconfig",
    "master",
    "manifests",
    "hostname_override",
    "cluster_cidr",
    "detect_local_mode",
    "pod_bridge_interface",
    "pod_interface_name_prefix",
    "nodeport_addresses",
    "masquerade_all",
    "bind_address",
    "network_policy",
    "audit_annotations",
    "pod_startup",
    "services",
    "verbose",
];

/// Writes the completion script of a shell.
pub(crate) fn print_completion(shell: Shell, out: &mut impl Write) -> io::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut parser(), "nftlet", &mut script);
    out.write_all(&script)
}

/// Writes the manual page.
pub(crate) fn print_man(out: &mut impl Write) -> io::Result<()> {
    clap_mangen::Man::new(parser()).render(out)
}

/// Returns the flags and the subcommands.
fn parser() -> clap::Command {
    let mut nftlet = Command::augment_subcommands(Settings::command())
        .args_conflicts_with_subcommands(true)
        .disable_help_subcommand(true);
    // Added one by one, since `augment_args` replaces the description of the command, too.
    let flags = Settings::augment_args(clap::Command::new("flags"));
    let flags: Vec<_> = flags
        .get_arguments()
        .map(|flag| {
            let is_shown = OF_QUESTIONS.contains(&flag.get_id().as_str());
            flag.clone().hide(!is_shown)
        })
        .collect();
    for name in QUESTIONS {
        nftlet = nftlet.mut_subcommand(name, |question| question.args(&flags));
    }
    nftlet
}

/// A parsed command line.
#[derive(Clone, Debug)]
pub(crate) struct CommandLine {
    pub(crate) command: Option<Command>,
    /// The values, defaults included.
    pub(crate) settings: Settings,
    matches: ArgMatches,
}

impl CommandLine {
    /// Parses the arguments, of which the first is the name of the program.
    ///
    /// # Errors
    ///
    /// Errors of the arguments, and the requests for help and the version.
    pub(crate) fn parse(
        arguments: impl IntoIterator<Item = impl Into<OsString> + Clone>,
    ) -> Result<Self, clap::Error> {
        let mut matches = parser().try_get_matches_from(arguments)?;
        let command = matches
            .subcommand()
            .map(|_| Command::from_arg_matches(&matches));
        let command = command.transpose()?;
        match matches.remove_subcommand() {
            Some((name, of_question)) if QUESTIONS.contains(&&*name) => matches = of_question,
            _ => {}
        }
        Ok(Self {
            command,
            settings: Settings::from_arg_matches(&matches)?,
            matches,
        })
    }

    /// Replaces the settings by those of a file. Flags without a field in the file keep their effect,
    /// and so do given flags that take precedence over it.
    pub(crate) fn replace(&mut self, mut settings: Settings) {
        let mut flags = self.matches.clone();
        for field in FIELDS {
            for flag in field.flags {
                if !(field.flag_wins && self.is_given(flag)) {
                    // This fails only for the name of no flag, which a test excludes.
                    let _ = flags.try_clear_id(flag);
                }
            }
        }
        match settings.update_from_arg_matches(&flags) {
            Ok(()) => self.settings = settings,
            // The flags have been parsed without an error before.
            Err(error) => error.exit(),
        }
    }

    /// Returns whether a flag was given, by its name in [`Settings`].
    fn is_given(&self, flag: &str) -> bool {
        self.matches.value_source(flag) == Some(ValueSource::CommandLine)
    }

    /// Returns the given flags that have no field in a configuration file, as arguments. With a file
    /// of the other settings they make up the same settings.
    pub(crate) fn without_field(&self) -> Vec<String> {
        let mut arguments = Vec::new();
        for flag in Settings::command().get_arguments() {
            let id = flag.get_id().as_str();
            let has_field = FIELDS.iter().any(|field| field.flags.contains(&id));
            if has_field || Ignored::contains(id) || !self.is_given(id) {
                continue;
            }
            let Some(name) = flag.get_long() else {
                continue;
            };
            if !flag.get_action().takes_values() {
                arguments.push(format!("--{name}"));
                continue;
            }
            let values = self.matches.try_get_raw(id).ok().flatten();
            let values = values.into_iter().flatten();
            arguments.extend(values.map(|it| format!("--{name}={}", it.to_string_lossy())));
        }
        arguments
    }

    /// Returns the given flags that a configuration file overrules, such as `--cluster-cidr`.
    pub(crate) fn overruled(&self) -> Vec<String> {
        let fields = FIELDS.iter().filter(|field| !field.flag_wins);
        let flags = fields.flat_map(|field| field.flags);
        let given = flags.filter(|flag| self.is_given(flag));
        let mut names: Vec<_> = given
            .map(|flag| format!("--{}", flag.replace('_', "-")))
            .collect();
        names.sort();
        names
    }

    /// Returns the values of all flags by name, including defaults. Flags that never have an effect
    /// are included only if they were given.
    pub(crate) fn values(&self) -> BTreeMap<String, String> {
        let command = Settings::command();
        let flags = command.get_arguments();
        let shown = flags.filter_map(|flag| {
            let id = flag.get_id().as_str();
            let name = flag.get_long().unwrap_or(id);
            (!Ignored::contains(id) || self.is_given(id))
                .then(|| (name.to_owned(), shown(&self.matches, id)))
        });
        shown.collect()
    }
}

/// Returns the value of a flag as text.
fn shown(matches: &ArgMatches, id: &str) -> String {
    let Ok(Some(raw)) = matches.try_get_raw(id) else {
        return String::new();
    };
    let texts: Vec<_> = raw.map(|value| value.to_string_lossy()).collect();
    texts.join(",")
}

/// Returns an error in one line, with the most similar flag or value.
pub(crate) fn one_line(error: &clap::Error) -> String {
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
    use std::path::Path;

    use super::super::file::{File, effective};
    use super::*;

    fn parsed(args: &[&str]) -> CommandLine {
        let all = ["nftlet"].iter().chain(args);
        CommandLine::parse(all).unwrap_or_else(|error| panic!("{args:?}: {error}"))
    }

    #[test]
    fn fields_of_the_file_name_flags_and_no_flag_twice() {
        let command = Settings::command();
        let mut seen = Vec::new();
        for flag in FIELDS.iter().flat_map(|field| field.flags) {
            let known = command.get_arguments().any(|arg| arg.get_id() == flag);
            assert!(known, "there is no {flag}");
            assert!(!seen.contains(flag), "{flag} has two fields");
            seen.push(flag);
        }
        assert!(seen.len() > 20, "{seen:?}");
    }

    #[test]
    fn flags_that_a_file_overrules_are_listed() {
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
    fn flags_without_a_field_and_a_file_of_the_others_make_up_the_same_settings() {
        for args in [
            &[][..],
            &[
                "--pod-startup=closed",
                "--deny-with",
                "reject",
                "--network-policy-strict",
                "--manifests=a",
                "--manifests=b",
                "--allow-empty",
                "--log-denied",
            ],
            &[
                "--services=off",
                "--audit-annotations=on",
                "--hostname-override=node-1",
                "--detect-local-mode=InterfaceNamePrefix",
                "--pod-interface-name-prefix=veth",
                "--pod-startup=closed",
                "--masquerade-all",
                "--vmodule=x",
                "-vv",
                "--socket=",
            ],
        ] {
            let agent = parsed(args);
            let flags = agent.without_field();
            let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
            let mut client = parsed(&flags);
            let configuration = effective(&agent.settings).to_string();
            let file = File::parse(Path::new("agent"), &configuration).expect("settings");
            client.replace(file.settings().clone());
            assert_eq!(effective(&client.settings), effective(&agent.settings));
            assert_eq!(client.without_field(), flags);
            let policies = |it: &Settings| {
                let strict = it.network_policy_strict;
                (
                    it.services,
                    it.audit_annotations,
                    it.pod_startup,
                    it.deny_with,
                    strict,
                    it.is_closed(),
                )
            };
            assert_eq!(policies(&client.settings), policies(&agent.settings));
        }
    }

    #[test]
    fn all_flags_have_a_value() {
        let line = parsed(&["--manifests=a", "--manifests=b", "-vv", "--dry-run"]);
        let values = line.values();
        let value = |name: &str| values[name].as_str();
        assert_eq!(value("manifests"), "a,b");
        assert_eq!(value("dry-run"), "true");
        assert_eq!(value("once"), "false");
        assert_eq!(value("detect-local-mode"), "ClusterCIDR");
        assert_eq!(value("cluster-cidr"), "");
    }

    #[test]
    fn errors_are_one_line_with_a_suggestion() {
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
    fn the_help_of_a_question_is_its_own() {
        for (name, about) in [
            ("audit", "List the connections"),
            ("diff", "Show what differs"),
            ("explain", "Explain whether a connection"),
            ("policies", "List policies"),
            ("reach", "Show who can connect"),
            ("services", "List services"),
            ("status", "Show the state"),
        ] {
            let error = CommandLine::parse(["nftlet", name, "--help"]).unwrap_err();
            let help = error.render().to_string();
            assert!(help.starts_with(about), "{help}");
            assert!(help.contains(&format!("Usage: nftlet {name}")), "{help}");
            assert!(help.contains("--cluster-cidr"), "{help}");
            assert!(!help.contains("--cleanup"), "{help}");
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
            let mut text = Vec::new();
            let written = match parsed(args).command {
                Some(Command::Completion { shell }) => print_completion(shell, &mut text),
                Some(Command::Man) => print_man(&mut text),
                other => panic!("{other:?}"),
            };
            written.expect("it is written");
            let text = String::from_utf8(text).expect("UTF-8");
            assert!(text.contains(part), "{args:?}: {text}");
        }
        for name in QUESTIONS {
            let question: &[&str] = match name {
                "diff" => &[name, "a", "b", "--manifests=a"],
                "explain" => &[name, "node", "internet", "--manifests=a"],
                _ => &[name, "--manifests=a"],
            };
            assert_eq!(parsed(question).settings.manifests.len(), 1, "{name}");
        }
        let all = ["nftlet", "--once", "man"];
        assert!(CommandLine::parse(all).is_err(), "flags and a subcommand");
    }
}
