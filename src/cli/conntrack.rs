//! The flags of connection tracking, with kube-proxy's names.

use std::time::Duration;

use clap::{ArgAction, Args};

use super::Error;
use super::kube_proxy::switch;

/// Kernel settings of connection tracking, made at the start where a flag asks for them. 0 asks
/// for nothing.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
#[command(next_help_heading = "Connection tracking (the kernel's values stay where no flag asks)")]
pub struct ConntrackArgs {
    /// Connections to track for each core (kube-proxy asks for 32768).
    #[arg(long, value_name = "N")]
    pub conntrack_max_per_core: Option<u32>,

    /// Connections to track at least, where --conntrack-max-per-core asks for any.
    #[arg(long, value_name = "N", default_value_t = 131_072)]
    pub conntrack_min: u32,

    /// How long an idle TCP connection is remembered (kube-proxy asks for 24h).
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub conntrack_tcp_timeout_established: Option<Duration>,

    /// How long a TCP connection in CLOSE_WAIT is remembered (kube-proxy asks for 1h).
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub conntrack_tcp_timeout_close_wait: Option<Duration>,

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
    pub conntrack_tcp_be_liberal: bool,

    /// How long a UDP flow without an answer is remembered.
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub conntrack_udp_timeout: Option<Duration>,

    /// How long a UDP flow with answers is remembered.
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub conntrack_udp_timeout_stream: Option<Duration>,
}

/// A duration as Go and kube-proxy write it, such as `24h0m0s`.
///
/// # Errors
///
/// [`Error::Duration`] for what is none, for one below zero, and for one that Go could not hold,
/// some 292 years.
pub fn duration(text: &str) -> Result<Duration, Error> {
    if text.trim() == "0" {
        return Ok(Duration::ZERO);
    }
    let parsed = text.trim().parse::<jiff::SignedDuration>();
    parsed
        .ok()
        .and_then(|duration| Duration::try_from(duration).ok())
        .filter(|duration| i64::try_from(duration.as_nanos()).is_ok())
        .ok_or_else(|| Error::Duration(text.to_owned()))
}
