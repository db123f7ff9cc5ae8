//! Where the settings come from, and what they ask of the process and the kernel at the start.

use std::fs;
use std::path::Path;
use std::thread;

use super::Error;
use crate::cli::{self, Args, BindAddress, CommandLine, OOM_SCORE_ADJ};
use crate::config::{self, File};
use crate::sysctl;

/// Reads the configuration file, if one is named, and puts its settings in the place of the
/// flags'.
pub(super) fn read(line: &mut CommandLine) -> Result<Option<File>, Error> {
    let Some(path) = line.args.process.config.clone() else {
        return Ok(None);
    };
    let file = File::read(&path)?;
    file.apply(line);
    Ok(Some(file))
}

/// Tells what of the command line and of the file has no effect.
    let ignored = line.args.ignored.given();
    if !ignored.is_empty() {
        tracing::warn!(
            "these flags of kube-proxy have no effect here: {}",
            ignored.join(", ")
        );
    }
pub(super) fn tell(line: &CommandLine, file: Option<&File>) {
    let (Some(path), Some(file)) = (&line.args.process.config, file) else {
        return;
    };
    let path = path.display();
    for note in file.notes() {
        tracing::warn!("{path}: {note}");
    }
    let overruled = line.overruled();
    if !overruled.is_empty() {
        tracing::warn!(
            "these flags are ignored, since the settings come from {path}: {}",
            overruled.join(", ")
        );
    }
}

/// Writes the settings in force as a configuration file.
    for (address, field) in [
        (args.healthz_bind_address, "healthzBindAddress"),
        (args.metrics_bind_address, "metricsBindAddress"),
    ] {
        if address == Some(BindAddress::Nowhere) {
            return Err(cli::Error::NowhereInFile(field).into());
        }
    }
pub(super) fn write(args: &Args, path: &Path) -> Result<(), Error> {
    let fault = |source| Error::WriteConfiguration {
        path: path.to_owned(),
        source,
    };
    let text = serde_saphyr::to_string(&config::effective(args));
    let text = text.map_err(|error| fault(std::io::Error::other(error)))?;
    fs::write(path, text).map_err(fault)?;
    tracing::info!("wrote the configuration to {}", path.display());
    Ok(())
}

/// Makes the kernel settings, for which nftlet may need more rights than afterwards.
pub(super) fn initialise(args: &Args) -> Result<(), Error> {
    if set_kernel(args) {
        tracing::info!("the kernel settings that were asked for are made");
        Ok(())
    } else {
        Err(Error::NotInitialised)
    }
}

/// Makes the kernel settings of connection tracking that are asked for; tells of those that
/// cannot be made, and returns whether there were none.
pub(super) fn set_kernel(args: &Args) -> bool {
    let flags = &args.conntrack;
    let asked = sysctl::Conntrack {
        max_per_core: flags.conntrack_max_per_core.unwrap_or_default(),
        min: flags.conntrack_min,
        tcp_established: flags.conntrack_tcp_timeout_established.unwrap_or_default(),
        tcp_close_wait: flags.conntrack_tcp_timeout_close_wait.unwrap_or_default(),
        tcp_be_liberal: flags.conntrack_tcp_be_liberal,
        udp: flags.conntrack_udp_timeout.unwrap_or_default(),
        udp_stream: flags.conntrack_udp_timeout_stream.unwrap_or_default(),
    };
    let cores = thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
    let unset = sysctl::apply(Path::new("/"), &asked.wanted(cores));
    for unset in &unset {
        tracing::warn!("{unset}");
    }
    unset.is_empty()
}

/// Protects the process while memory is short. Lowering the score takes CAP_SYS_RESOURCE, which
/// nftlet does not need otherwise, and kubelet gives critical pods a low score of its own: so it
/// is a warning only where somebody asked for it.
pub(super) fn set_oom_score(args: &Args) {
    let asked = args.process.oom_score_adj;
    let score = asked.unwrap_or(OOM_SCORE_ADJ);
    if let Err(unset) = sysctl::set_oom_score(Path::new("/"), score) {
        if asked.is_some() {
            tracing::warn!("{unset}");
        } else {
            tracing::debug!("{unset}");
        }
    }
}
