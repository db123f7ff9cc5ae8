//! Reads and writes the settings, and applies those of the process itself.

use std::fs;
use std::io::{self, IsTerminal};
use std::path::Path;

use super::Error;
use crate::host::sysctls;
use crate::logging::LogQueue;
use crate::settings::file::{self, File};
use crate::settings::{self, BindAddress, CommandLine, LogFormat, Settings};

/// Directs the log to `log`, with the verbosity and format of the settings.
pub(super) fn start_logging(settings: &Settings, log: &LogQueue) {
    use tracing_subscriber::filter::{EnvFilter, LevelFilter};
    let level = match settings.verbosity() {
        0 => LevelFilter::INFO,
        1 => LevelFilter::DEBUG,
        2.. => LevelFilter::TRACE,
    };
    let filter = if settings.verbosity() < 3 {
        // kube_client logs each failed request; the source logs an outage once.
        EnvFilter::new(format!("error,kube_client=off,nftlet={level}"))
    } else {
        EnvFilter::new("trace")
    };
    let logging = tracing_subscriber::fmt()
        .with_writer(log.clone())
        // It would write to standard error directly, which can block.
        .log_internal_errors(false)
        .with_ansi(io::stderr().is_terminal())
        .with_target(settings.verbosity() > 0)
        .with_env_filter(filter);
    // Fails only if a subscriber is installed, as in tests.
    let _ = match settings.log_format {
        LogFormat::Text => logging.try_init(),
        LogFormat::Json => logging.json().try_init(),
    };
}

/// Reads the configuration file, if there is one, and replaces the flags that it overrules.
pub(super) fn read(line: &mut CommandLine) -> Result<Option<File>, Error> {
    let Some(path) = line.settings.config.clone() else {
        return Ok(None);
    };
    let file = File::read(&path)?;
    line.replace(file.settings().clone());
    Ok(Some(file))
}

/// Logs which flags and fields of the file have no effect.
pub(super) fn warn_of_ignored(line: &CommandLine, file: Option<&File>) {
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
pub(super) fn write(settings: &Settings, path: &Path) -> Result<(), Error> {
    for (address, field) in [
        (settings.healthz_bind_address, "healthzBindAddress"),
        (settings.metrics_bind_address, "metricsBindAddress"),
    ] {
        if address == Some(BindAddress::Nowhere) {
            return Err(settings::Error::NowhereInFile(field).into());
        }
    }
    let fault = |source| Error::WriteConfiguration {
        path: path.to_owned(),
        source,
    };
    let text = serde_saphyr::to_string(&file::effective(settings));
    let text = text.map_err(|error| fault(io::Error::other(error)))?;
    fs::write(path, text).map_err(fault)?;
    tracing::info!("wrote the configuration to {}", path.display());
    Ok(())
}

/// Sets the score by which the kernel selects a process to kill when memory is short.
///
/// Lowering it takes CAP_SYS_RESOURCE, which nftlet needs for nothing else, and the kubelet gives
/// critical pods a low score anyway: a failure is a warning only if a score was requested.
pub(super) fn set_oom_score(settings: &Settings) {
    let requested = settings.oom_score_adj.is_some();
    if let Err(error) = sysctls::set_oom_score(Path::new("/"), settings.oom_score_adj()) {
        if requested {
            tracing::warn!("{error}");
        } else {
            tracing::debug!("{error}");
        }
    }
}
