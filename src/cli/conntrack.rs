//! The flags of connection tracking, with kube-proxy's names and defaults.

use std::time::Duration;

use clap::Args;

use super::Error;

/// Kernel settings of connection tracking. They are made at the start when nftlet works for a
/// cluster, and with --manifests only where a flag asks for them. 0 leaves a setting alone.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
#[command(next_help_heading = "Connection tracking (at the start; 0 leaves the kernel's value)")]
pub struct ConntrackArgs {
    /// Connections to track for each core [default: 32768; none with --manifests].
    #[arg(long, value_name = "N")]
    pub conntrack_max_per_core: Option<u32>,

    /// Connections to track at least [default: 131072].
    #[arg(long, value_name = "N")]
    pub conntrack_min: Option<u32>,

    /// How long an idle TCP connection is remembered [default: 24h; as it is with --manifests].
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub conntrack_tcp_timeout_established: Option<Duration>,

    /// How long a TCP connection in CLOSE_WAIT is remembered [default: 1h; as it is with
    /// --manifests].
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub conntrack_tcp_timeout_close_wait: Option<Duration>,

    /// Accept TCP packets outside of the window.
    #[arg(long)]
    pub conntrack_tcp_be_liberal: bool,

    /// How long a UDP flow without an answer is remembered.
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub conntrack_udp_timeout: Option<Duration>,

    /// How long a UDP flow with answers is remembered.
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub conntrack_udp_timeout_stream: Option<Duration>,
}

/// A duration as Go and kube-proxy write it, such as `24h0m0s`.
fn duration(text: &str) -> Result<Duration, Error> {
    if text.trim() == "0" {
        return Ok(Duration::ZERO);
    }
    let parsed = text.trim().parse::<jiff::SignedDuration>();
    parsed
        .ok()
        .and_then(|duration| Duration::try_from(duration).ok())
        .ok_or_else(|| Error::Duration(text.to_owned()))
}
