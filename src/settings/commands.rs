//! The subcommands and their arguments.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use clap_complete::Shell;

use super::values;

// Without a doc comment, which would be the text above the flags in --help.
#[derive(Clone, Debug, PartialEq, Eq, Subcommand)]
pub(crate) enum Command {
    /// Show what differs between two sides: objects, services, who can connect to whom, and rules.
    ///
    /// Exits with 0 if nothing differs, and with 3 if something does.
    Diff(Diff),
    /// Explain whether a connection is allowed, by which endpoint and which policy.
    ///
    /// Exits with 0 if the connection is allowed, and with 3 if it is not, or only in part.
    Explain(Explain),
    /// List policies with the pods of this node that they select.
    Policies(Policies),
    /// Show the state of the agent on this node, what is wrong first.
    ///
    /// Exits with 0 if it is healthy, and with 3 if it is not.
    Status(Status),
    /// List the connections that audited policies would deny, as the agent of this node has seen them.
    ///
    /// The agent needs --audit-annotations=on.
    Audit(Audit),
    /// Show who can connect to whom in the whole cluster, by the network policies.
    ///
    /// Exits with 3 if an expectation is not met.
    Reach(Reach),
    /// List services with their frontends and endpoints, and why endpoints get no traffic.
    Services(Services),
    /// Print a script with which a shell completes nftlet's flags.
    Completion {
        /// The shell.
        #[arg(value_name = "bash|zsh|fish")]
        shell: Shell,
    },
    /// Print the manual page, for `man -l -`.
    Man,
}

/// The form of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    #[default]
    Text,
    /// For programs, with the field `apiVersion`.
    Json,
}

// Without doc comments, which would replace that of the subcommand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Args)]
pub(crate) struct Source {
    /// Read the objects from the API server, as in a pod, instead of asking the agent of this node.
    #[arg(long)]
    pub(crate) live: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Args)]
pub(crate) struct Form {
    /// The form of the answer.
    #[arg(
        short,
        long,
        value_name = "text|json",
        default_value = "text",
        hide_default_value = true,
        hide_possible_values = true
    )]
    pub(crate) output: Output,
}

/// The arguments of `nftlet explain`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
#[command(
    override_usage = "nftlet explain [OPTIONS] FROM TO[:PORT][/PROTOCOL]\n       nftlet explain [OPTIONS] --batch FILE"
)]
pub(crate) struct Explain {
    /// The source: namespace/pod, svc/namespace/name, deploy/namespace/name, an IP address, node or
    /// internet.
    #[arg(value_name = "FROM", required_unless_present = "batch")]
    pub(crate) from: Option<String>,
    /// The destination, as the source, with a port by number or name (an IPv6 address in brackets
    /// then) and TCP, UDP, SCTP or ICMP.
    #[arg(value_name = "TO[:PORT][/PROTOCOL]", required_unless_present = "batch")]
    pub(crate) to: Option<String>,
    /// Answer the questions of a file, one a line; - is standard input. Each answer is one line of
    /// JSON.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["from", "to", "output"])]
    pub(crate) batch: Option<PathBuf>,
    /// Name the tables, chains and set elements that decide. The agent of this node also says whether
    /// the kernel has them, to which endpoint the client is bound, which connections are tracked, and
    /// how many packets were denied.
    #[arg(long)]
    pub(crate) rules: bool,
    #[command(flatten)]
    pub(crate) source: Source,
    #[command(flatten)]
    pub(crate) form: Form,
}

/// The arguments of `nftlet services`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub(crate) struct Services {
    /// Only the services of a namespace, or one of them with all its endpoints.
    #[arg(value_name = "NAMESPACE[/NAME]")]
    pub(crate) of: Option<String>,
    /// Only services with frontends of which no endpoint is used.
    #[arg(long)]
    pub(crate) no_endpoints: bool,
    /// Only services that have no rules because of a fault.
    #[arg(long)]
    pub(crate) refused: bool,
    #[command(flatten)]
    pub(crate) source: Source,
    #[command(flatten)]
    pub(crate) form: Form,
}

/// The arguments of `nftlet status`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub(crate) struct Status {
    /// Show it again every two seconds, until interrupted.
    #[arg(long)]
    pub(crate) watch: bool,
    #[command(flatten)]
    pub(crate) form: Form,
}

/// The arguments of `nftlet audit`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub(crate) struct Audit {
    /// Only what was seen within this time, such as 24h or 90m.
    #[arg(long, value_name = "TIME", value_parser = values::duration)]
    pub(crate) since: Option<Duration>,
    #[command(flatten)]
    pub(crate) form: Form,
}

/// The arguments of `nftlet policies`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub(crate) struct Policies {
    /// Only the policies of a namespace, or one of them with the pods that it selects.
    #[arg(value_name = "NAMESPACE[/NAME]")]
    pub(crate) of: Option<String>,
    #[command(flatten)]
    pub(crate) source: Source,
    #[command(flatten)]
    pub(crate) form: Form,
}

/// The arguments of `nftlet reach`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub(crate) struct Reach {
    /// What a row and a column are. A workload is the owner of pods, such as a Deployment.
    #[arg(
        long,
        value_name = "pod|workload|namespace",
        default_value = "workload",
        hide_default_value = true,
        hide_possible_values = true
    )]
    pub(crate) by: ReachBy,
    /// Only these sources: a namespace, namespace/name of a workload or pod, or internet.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub(crate) from: Vec<String>,
    /// Only these destinations, as the sources.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub(crate) to: Vec<String>,
    /// Only these ports: TCP/80, UDP/8000-8080, TCP, ICMP.
    #[arg(long, value_name = "PROTOCOL/PORT", value_delimiter = ',')]
    pub(crate) port: Vec<String>,
    /// Show what addresses outside of the cluster and pods of other namespaces can connect to.
    #[arg(long, conflicts_with = "from")]
    pub(crate) exposed: bool,
    /// Check the expectations in a file of YAML, - for standard input: a list of from, to, allow and
    /// deny with lists of ports. Prints the results in the Test Anything Protocol.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["by", "from", "to", "port", "exposed", "output"])]
    pub(crate) expect: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) source: Source,
    /// The form of the answer; html is a page that needs no network.
    #[arg(
        short,
        long,
        value_name = "matrix|lines|json|html",
        default_value = "matrix",
        hide_default_value = true,
        hide_possible_values = true
    )]
    pub(crate) output: ReachOutput,
}

/// What a row of the matrix is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ReachBy {
    Pod,
    Workload,
    Namespace,
}

/// The form of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ReachOutput {
    #[value(alias = "text")]
    Matrix,
    Lines,
    Json,
    Html,
}

/// The arguments of `nftlet diff`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub(crate) struct Diff {
    /// What is compared: a path of manifests or of a dump (- for standard input), agent, cluster (the
    /// API server) or kernel (the tables in force on this node).
    #[arg(value_name = "A")]
    pub(crate) a: String,
    /// What it is compared with, as A.
    #[arg(value_name = "B")]
    pub(crate) b: String,
    /// The form of the answer; markdown is for pull requests.
    #[arg(
        short,
        long,
        value_name = "text|markdown|json",
        default_value = "text",
        hide_default_value = true,
        hide_possible_values = true
    )]
    pub(crate) output: DiffOutput,
}

/// The form of the differences.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DiffOutput {
    Text,
    Markdown,
    Json,
}
