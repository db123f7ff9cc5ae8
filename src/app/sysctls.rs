//! The kernel parameters of connection tracking.
//!
//! Their files appear when the kernel loads connection tracking, which a freshly booted node may
//! not have done: a request for flows loads it. Where it does not, the first rules do, and the
//! parameters are set after them.

use std::path::Path;
use std::thread::{self, JoinHandle};

use tokio::sync::oneshot;

use super::{Error, system};
use crate::host::sysctls::{self, Unset};
use crate::model::{Notice, Reason, Subject};
use crate::netlink::{Conntrack, FlowFilter};
use crate::nft::TableFamily;
use crate::settings::Settings;
use crate::sync::{LogAndSend, Reporter};

/// Files and their values.
type Wanted = Vec<(&'static str, u64)>;

/// Sets the parameters for `--init-only`.
pub(super) fn initialise(settings: &Settings) {
    let wanted = of_this_machine(&wanted(settings));
    let unset = set(Path::new("/"), &wanted, load);
    for unset in &unset {
        tracing::warn!("{unset}");
    }
    if unset.is_empty() {
        tracing::info!("the kernel parameters are set");
    }
}

/// Sets the parameters. Returns the thread that sets those whose files do not exist before the
/// first rules, if there are any.
pub(super) fn start(
    settings: &Settings,
    reporter: &LogAndSend,
    ready: &mut Vec<oneshot::Sender<()>>,
) -> Result<Option<JoinHandle<()>>, Error> {
    let wanted = of_this_machine(&wanted(settings));
    let explicit = of_this_machine(&explicit(settings));
    let unset = set(Path::new("/"), &wanted, load);
    let (later, never): (Vec<_>, Vec<_>) = unset.into_iter().partition(Unset::is_missing);
    report(&never, &explicit, reporter);
    if later.is_empty() {
        return Ok(None);
    }
    let (sender, first_rules) = oneshot::channel();
    ready.push(sender);
    let reporter = reporter.clone();
    let again = move || {
        if first_rules.blocking_recv().is_err() {
            return;
        }
        let missing = |file: &str| later.iter().any(|unset| unset.path == Path::new(file));
        let wanted: Wanted = wanted.into_iter().filter(|(it, _)| missing(it)).collect();
        let unset = sysctls::apply(Path::new("/"), &wanted);
        report(&unset, &explicit, &reporter);
    };
    thread::Builder::new()
        .name("settings".into())
        .spawn(again)
        .map(Some)
        .map_err(system("the thread that sets kernel parameters"))
}

/// Reports the parameters that could not be set. The pod of a DaemonSet may set none, so one that
/// was not requested is no warning: the node keeps its value.
fn report(unset: &[Unset], explicit: &[(&'static str, u64)], reporter: &LogAndSend) {
    for unset in unset {
        if !explicit
            .iter()
            .any(|(file, _)| unset.path == Path::new(file))
        {
            tracing::info!("{unset}");
            continue;
        }
        reporter.notice(&Notice {
            subject: Subject::Other("kernel settings".into()),
            reason: Reason::KernelSetting,
            message: unset.to_string(),
        });
    }
}

/// Returns the requested values, and the defaults of the others.
fn wanted(settings: &Settings) -> sysctls::ConntrackParameters {
    sysctls::ConntrackParameters {
        max_per_core: settings.conntrack_max_per_core(),
        min: settings.conntrack_min,
        tcp_established: settings.conntrack_tcp_timeout_established(),
        tcp_close_wait: settings.conntrack_tcp_timeout_close_wait(),
        tcp_be_liberal: settings.conntrack_tcp_be_liberal,
        udp: settings.conntrack_udp_timeout.unwrap_or_default(),
        udp_stream: settings.conntrack_udp_timeout_stream.unwrap_or_default(),
    }
}

/// Returns the requested values.
fn explicit(settings: &Settings) -> sysctls::ConntrackParameters {
    sysctls::ConntrackParameters {
        max_per_core: settings.conntrack_max_per_core.unwrap_or_default(),
        tcp_established: settings
            .conntrack_tcp_timeout_established
            .unwrap_or_default(),
        tcp_close_wait: settings
            .conntrack_tcp_timeout_close_wait
            .unwrap_or_default(),
        ..wanted(settings)
    }
}

fn of_this_machine(settings: &sysctls::ConntrackParameters) -> Wanted {
    settings.wanted(sysctls::cores(Path::new("/")))
}

/// Sets the parameters below a root directory, after `load` if a file is missing.
fn set(root: &Path, wanted: &[(&'static str, u64)], load: impl FnOnce()) -> Vec<Unset> {
    if wanted.iter().any(|(file, _)| !root.join(file).exists()) {
        load();
    }
    sysctls::apply(root, wanted)
}

/// Makes the kernel load connection tracking, by asking it for flows.
fn load() {
    let flows = Conntrack::open()
        .and_then(|mut conntrack| conntrack.flows(&FlowFilter::all(TableFamily::Ip), |_| {}));
    if let Err(error) = flows {
        tracing::debug!("{error}; kernel parameters wait for the first rules");
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
        let unset = set(root.path(), &[(file, 60)], || {});
        assert!(unset.iter().all(Unset::is_missing) && unset.len() == 1);
        let appear = || {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "30\n").unwrap();
        };
        assert!(set(root.path(), &[(file, 60)], appear).is_empty());
        assert_eq!(fs::read_to_string(&path).unwrap(), "60");
        let unset = set(root.path(), &[(file, 61)], || panic!("it is loaded"));
        assert!(unset.is_empty());
        assert!(set(root.path(), &[], || panic!("nothing is requested")).is_empty());
    }
}
