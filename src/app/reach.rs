//! The command that shows who can connect to whom.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::{Error, print};
use crate::insight::reach::{
    By, ExpectError, Expectation, PortSet, Reach, ReachError, asked_ports, check, expectations,
    exposed, exposed_json, exposed_text, json, lines, matrix, page,
};
use crate::insight::{Facts, Style};
use crate::settings::{self, ReachBy, ReachOutput, Settings};

/// The exit status of an expectation that is not met.
const NOT_MET: u8 = 3;

/// Why a file of expectations cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FileError {
    #[error("cannot read the expectations in {}: {source}; name a file, or - for standard input", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error(
        "standard input cannot be both the objects and the expectations; name a file for one of them"
    )]
    OneInput,
    #[error("{}: {source}", path.display())]
    Content { path: PathBuf, source: ExpectError },
}

/// What is asked, apart from names that only the objects know.
pub(super) struct Asked<'s> {
    line: &'s settings::Reach,
    ports: PortSet,
    expectations: Option<Vec<Expectation>>,
}

impl<'s> Asked<'s> {
    /// Reads what is asked.
    ///
    /// # Errors
    ///
    /// If a port or an expectation is not valid.
    pub fn new(line: &'s settings::Reach, settings: &Settings) -> Result<Self, Error> {
        let is_input = |path: &PathBuf| path == Path::new("-");
        if line.expect.as_ref().is_some_and(is_input) && settings.manifests.iter().any(is_input) {
            return Err(FileError::OneInput.into());
        }
        let ports = line.port.iter().map(|text| asked_ports(text));
        let ports = ports.collect::<Result<Vec<_>, _>>()?;
        let ports = ports.into_iter().reduce(|one, other| one.union(&other));
        if line.exposed && line.output == ReachOutput::Html {
            return Err(ReachError::ExposedPage.into());
        }
        Ok(Self {
            line,
            ports: ports.unwrap_or_else(PortSet::all),
            expectations: line.expect.as_deref().map(read).transpose()?,
        })
    }

    /// Answers from the facts.
    pub fn answer(&self, facts: &Facts, style: Style) -> Result<ExitCode, Error> {
        let reach = Reach::new(facts)?;
        if let Some(expectations) = &self.expectations {
            let mut are_met = false;
            print(|out| {
                are_met = check(&reach, expectations, out)?;
                Ok(())
            })?;
            return Ok(match are_met {
                true => ExitCode::SUCCESS,
                false => ExitCode::from(NOT_MET),
            });
        }
        let by = match self.line.by {
            ReachBy::Pod => By::Pod,
            ReachBy::Workload => By::Workload,
            ReachBy::Namespace => By::Namespace,
        };
        let to = reach.rows(by, &self.line.to)?;
        let ports = self.ports.clone();
        if self.line.exposed {
            let rows = exposed(&reach, &to, ports)?;
            print(|out| match self.line.output {
                ReachOutput::Json => exposed_json(&reach, &rows, out),
                _ => exposed_text(&reach, &rows, out),
            })?;
            return Ok(ExitCode::SUCCESS);
        }
        let from = reach.rows(by, &self.line.from)?;
        let rows = [&*from, &*to];
        match self.line.output {
            ReachOutput::Matrix => print(|out| matrix(&reach, rows, ports, style, out))?,
            ReachOutput::Lines => print(|out| lines(&reach, rows, ports, out))?,
            ReachOutput::Json => print(|out| json(&reach, rows, ports, out))?,
            ReachOutput::Html => {
                let write = page(&reach, rows, ports)?;
                print(|out| write(out))?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn read(path: &Path) -> Result<Vec<Expectation>, FileError> {
    let text = match path == Path::new("-") {
        true => io::read_to_string(io::stdin()),
        false => fs::read_to_string(path),
    };
    let path = path.to_owned();
    match text {
        Ok(text) => expectations(&text).map_err(|source| FileError::Content { path, source }),
        Err(source) => Err(FileError::Read { path, source }),
    }
}

/// Returns the settings for a question about the whole cluster, which is about no node.
pub(super) fn of_cluster(settings: &Settings) -> Settings {
    Settings {
        pod_startup: settings::PodStartup::Open,
        ..settings.clone()
    }
}
