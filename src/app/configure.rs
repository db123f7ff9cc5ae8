//! Where the settings come from, and what they ask of the process at the start.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use super::Error;
use crate::host::sysctls;
use crate::settings::file::{self, File};
use crate::settings::{self, BindAddress, CommandLine, Settings};

/// The files that are open in quiet times, and some more for connections and health checks.
const DESCRIPTORS: usize = 64;

/// Reads the configuration file, if one is named, and puts its settings in the place of the
/// flags'.
pub(super) fn read(line: &mut CommandLine) -> Result<Option<File>, Error> {
    let Some(path) = line.settings.config.clone() else {
        return Ok(None);
    };
    let file = File::read(&path)?;
    file.apply(line);
    Ok(Some(file))
}

/// Tells what of the command line and of the file has no effect.
pub(super) fn tell(line: &CommandLine, file: Option<&File>) {
    let ignored = line.settings.ignored.given();
    if !ignored.is_empty() {
        tracing::warn!(
            "these flags of kube-proxy have no effect here: {}",
            ignored.join(", ")
        );
    }
    let (Some(path), Some(file)) = (&line.settings.config, file) else {
        if let Some(note) = line.settings.proxy_mode.note() {
            tracing::warn!("--proxy-mode: {note}");
        }
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
pub(super) fn write(args: &Settings, path: &Path) -> Result<(), Error> {
    for (address, field) in [
        (args.healthz_bind_address, "healthzBindAddress"),
        (args.metrics_bind_address, "metricsBindAddress"),
    ] {
        if address == Some(BindAddress::Nowhere) {
            return Err(settings::Error::NowhereInFile(field).into());
        }
    }
    let fault = |source| Error::WriteConfiguration {
        path: path.to_owned(),
        source,
    };
    let text = serde_saphyr::to_string(&file::effective(args));
    let text = text.map_err(|error| fault(std::io::Error::other(error)))?;
    fs::write(path, text).map_err(fault)?;
    tracing::info!("wrote the configuration to {}", path.display());
    Ok(())
}

/// Checks that what nftlet keeps open can be opened: a runtime without descriptors would end the
/// process with a panic.
pub(super) fn check_descriptors() -> Result<(), Error> {
    let stderr = std::io::stderr();
    let opened: std::io::Result<Vec<_>> = (0..DESCRIPTORS)
        .map(|_| stderr.as_fd().try_clone_to_owned())
        .collect();
    opened.map(drop).map_err(|source| Error::Descriptors {
        needed: DESCRIPTORS,
        source,
    })
}

/// Protects the process while memory is short. Lowering the score takes CAP_SYS_RESOURCE, which
/// nftlet does not need otherwise, and kubelet gives critical pods a low score of its own: so it
/// is a warning only where somebody asked for it.
pub(super) fn set_oom_score(args: &Settings) {
    let asked = args.oom_score_adj.is_some();
    if let Err(unset) = sysctls::set_oom_score(Path::new("/"), args.oom_score_adj()) {
        if asked {
            tracing::warn!("{unset}");
        } else {
            tracing::debug!("{unset}");
        }
    }
}
