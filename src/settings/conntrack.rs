//! The settings of connection tracking, with kube-proxy's names.

use std::time::Duration;

use clap::{ArgAction, Args};

use super::values::{count, duration, switch};

/// Kernel settings of connection tracking, made at the start. 0 leaves the kernel's value.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
#[command(next_help_heading = "Connection tracking (0 leaves the kernel's value)")]
pub(crate) struct Conntrack {
    /// Connections to track for each core [default: 32768, as far as the process may].
    #[arg(long, value_name = "N", value_parser = count)]
    pub(crate) conntrack_max_per_core: Option<u32>,

    /// Connections to track at least, unless --conntrack-max-per-core is 0.
    #[arg(long, value_name = "N", default_value_t = 131_072, value_parser = count)]
    pub(crate) conntrack_min: u32,

    /// How long an idle TCP connection is remembered [default: 24h, as far as the process may].
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) conntrack_tcp_timeout_established: Option<Duration>,

    /// How long a TCP connection in CLOSE_WAIT is remembered [default: 1h, as far as the process
    /// may].
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) conntrack_tcp_timeout_close_wait: Option<Duration>,

    /// Accept TCP packets outside of the window.
    #[arg(
        long,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        default_value_t = false,
        hide_default_value = true,
        value_name = "true|false",
        value_parser = switch,
        action = ArgAction::Set
    )]
    pub(crate) conntrack_tcp_be_liberal: bool,

    /// How long a UDP flow without an answer is remembered.
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) conntrack_udp_timeout: Option<Duration>,

    /// How long a UDP flow with answers is remembered.
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) conntrack_udp_timeout_stream: Option<Duration>,
}

impl Conntrack {
    /// Returns the connections for each core: the setting, or kube-proxy's default.
    pub(crate) fn max_per_core(&self) -> u32 {
        self.conntrack_max_per_core.unwrap_or(32_768)
    }

    /// Returns the timeout of established TCP connections: the setting, or kube-proxy's default.
    pub(crate) fn tcp_established(&self) -> Duration {
        let default = Duration::from_secs(24 * 60 * 60);
        self.conntrack_tcp_timeout_established.unwrap_or(default)
    }

    /// Returns the timeout of TCP connections in CLOSE_WAIT: the setting, or kube-proxy's default.
    pub(crate) fn tcp_close_wait(&self) -> Duration {
        let default = Duration::from_secs(60 * 60);
        self.conntrack_tcp_timeout_close_wait.unwrap_or(default)
    }
}
