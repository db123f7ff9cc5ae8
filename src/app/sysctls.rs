//! The kernel settings of connection tracking.
//!
//! Their files come into being with the kernel's connection tracking, which a freshly booted node
//! may not have loaded: asking it for flows loads it. Where even that brings no file, the first
//! rules do, and the settings are made behind them.

use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use tokio::sync::oneshot;

use super::{Error, system};
use crate::host::sysctls::{self, Unset};
use crate::model::{Notice, Reason, Subject};
use crate::netlink::{Conntrack, FlowFilter};
use crate::nft::Family;
use crate::serve::metrics::Metrics;
use crate::settings::Settings;
use crate::sync::{LogAndSend, Reporter};

/// The files with their values.
type Wanted = Vec<(&'static str, u64)>;

/// Makes the settings and tells what cannot be made, for `--init-only`.
pub(super) fn initialise(args: &Settings) {
    let wanted = of_this_machine(&wanted(args));
    let unset = make(Path::new("/"), &wanted, load);
    for unset in &unset {
        tracing::warn!("{unset}");
    }
    if unset.is_empty() {
        tracing::info!("the kernel settings are made");
    }
}

/// Makes the settings. Returned is the thread that makes those behind the first rules which cannot
/// be made before; it ends then.
///
/// # Errors
///
/// When the system refuses the thread.
pub(super) fn start(
    args: &Settings,
    metrics: &Arc<Metrics>,
    reporter: &LogAndSend,
    ready: &mut Vec<oneshot::Sender<()>>,
) -> Result<Option<JoinHandle<()>>, Error> {
    let wanted = of_this_machine(&wanted(args));
    let explicit = of_this_machine(&explicit(args));
    let unset = make(Path::new("/"), &wanted, load);
    let (later, never): (Vec<_>, Vec<_>) = unset.into_iter().partition(Unset::is_missing);
    report(&never, &explicit, metrics, reporter);
    if later.is_empty() {
        return Ok(None);
    }
    let (told, begin) = oneshot::channel();
    ready.push(told);
    let (metrics, reporter) = (metrics.clone(), reporter.clone());
    let again = move || {
        if begin.blocking_recv().is_err() {
            return;
        }
        let missing = |file: &str| later.iter().any(|unset| unset.path == Path::new(file));
        let wanted: Wanted = wanted.into_iter().filter(|(it, _)| missing(it)).collect();
        let unset = sysctls::apply(Path::new("/"), &wanted);
        report(&unset, &explicit, &metrics, &reporter);
    };
    thread::Builder::new()
        .name("settings".into())
        .spawn(again)
        .map(Some)
        .map_err(system("the thread that makes kernel settings"))
}

/// Reports the settings that could not be made. The pod of a DaemonSet may write none, so a default
/// is worth no warning: the node keeps its own value.
fn report(
    unset: &[Unset],
    explicit: &[(&'static str, u64)],
    metrics: &Metrics,
    reporter: &LogAndSend,
) {
    for unset in unset {
        if !explicit
            .iter()
            .any(|(file, _)| unset.path == Path::new(file))
        {
            tracing::info!("{unset}");
            continue;
        }
        metrics.notice(Reason::KernelSetting.as_str());
        reporter.notice(&Notice {
            subject: Subject::Other("kernel settings".into()),
            reason: Reason::KernelSetting,
            message: unset.to_string(),
        });
    }
}

/// Returns the settings that are asked for, and the defaults of the others.
fn wanted(args: &Settings) -> sysctls::Conntrack {
    sysctls::Conntrack {
        max_per_core: args.conntrack_max_per_core(),
        min: args.conntrack_min,
        tcp_established: args.conntrack_tcp_timeout_established(),
        tcp_close_wait: args.conntrack_tcp_timeout_close_wait(),
        tcp_be_liberal: args.conntrack_tcp_be_liberal,
        udp: args.conntrack_udp_timeout.unwrap_or_default(),
        udp_stream: args.conntrack_udp_timeout_stream.unwrap_or_default(),
    }
}

/// Returns the settings that are asked for.
fn explicit(args: &Settings) -> sysctls::Conntrack {
    sysctls::Conntrack {
        max_per_core: args.conntrack_max_per_core.unwrap_or_default(),
        tcp_established: args.conntrack_tcp_timeout_established.unwrap_or_default(),
        tcp_close_wait: args.conntrack_tcp_timeout_close_wait.unwrap_or_default(),
        ..wanted(args)
    }
}

fn of_this_machine(settings: &sysctls::Conntrack) -> Wanted {
    settings.wanted(sysctls::cores(Path::new("/")))
}

/// Makes the settings below a root directory; `load` brings connection tracking, where a file is
/// missing.
fn make(root: &Path, wanted: &[(&'static str, u64)], load: impl FnOnce()) -> Vec<Unset> {
    if wanted.iter().any(|(file, _)| !root.join(file).exists()) {
        load();
    }
    sysctls::apply(root, wanted)
}

/// Has the kernel load connection tracking.
fn load() {
    let asked = Conntrack::open().and_then(|mut conntrack| {
        // There are none, or it is loaded already.
        conntrack.flows(&FlowFilter::all(Family::Ip), |_| {})
    });
    if let Err(error) = asked {
        tracing::debug!("{error}; kernel settings wait for the first rules");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn connection_tracking_is_loaded_where_a_file_is_missing() {
        let root = tempfile::tempdir().unwrap();
        let file = "proc/sys/net/netfilter/nf_conntrack_udp_timeout";
        let path = root.path().join(file);
        let unset = make(root.path(), &[(file, 60)], || {});
        assert!(unset.iter().all(Unset::is_missing) && unset.len() == 1);
        let appear = || {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "30\n").unwrap();
        };
        assert!(make(root.path(), &[(file, 60)], appear).is_empty());
        assert_eq!(fs::read_to_string(&path).unwrap(), "60");
        let unset = make(root.path(), &[(file, 61)], || panic!("it is loaded"));
        assert!(unset.is_empty());
        assert!(make(root.path(), &[], || panic!("nothing is asked for")).is_empty());
    }
}
