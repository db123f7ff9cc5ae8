//! The commands that answer people's questions.

use std::fs;
use std::io::{self, BufRead, IsTerminal};
use std::path::Path;
use std::process::ExitCode;

use serde_json::json;

use super::dry_run::collect;
use super::{Error, print, single_threaded};
use crate::insight::{
    API_VERSION, Facts, Question, ServiceFilter, Style, Verdict, answer_text, explain, services,
    services_text,
};
use crate::services::ServiceSettings;
use crate::settings::{Command, Explain, Output, Services, Settings};

/// The exit status of a connection that is not allowed.
const DENIED: u8 = 3;

/// Runs a command that answers questions. Returns the exit status of its answer.
pub(super) fn answer(
    command: &Command,
    settings: &Settings,
    node_name: &str,
    service_settings: &ServiceSettings,
) -> Result<ExitCode, Error> {
    // A question that cannot be understood is an error before anything is read.
    let question = match command {
        Command::Explain(asked) => question(asked)?,
        _ => None,
    };
    let collect = collect(settings, node_name, service_settings);
    let (store, policies) = single_threaded()?.block_on(collect)?;
    let facts = Facts {
        store: &store,
        settings: service_settings,
        policies: &policies,
        node: node_name,
    };
    match command {
        Command::Explain(asked) => match (&question, &asked.batch) {
            (Some(question), _) => one(&facts, question, asked.output),
            (None, Some(file)) => batch(&facts, file),
            (None, None) => Ok(ExitCode::SUCCESS),
        },
        Command::Services(asked) => list_services(&facts, asked),
        Command::Completion { .. } | Command::Man => Ok(ExitCode::SUCCESS),
    }
}

fn question(asked: &Explain) -> Result<Option<Question>, Error> {
    match (&asked.from, &asked.to) {
        (Some(from), Some(to)) => Ok(Some(Question::new(from, to)?)),
        _ => Ok(None),
    }
}

fn style() -> Style {
    Style {
        colour: io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
    }
}

fn one(facts: &Facts, question: &Question, output: Output) -> Result<ExitCode, Error> {
    let answer = explain(facts, question)?;
    print(|out| match output {
        Output::Json => {
            serde_json::to_writer_pretty(&mut *out, &answer)?;
            writeln!(out)
        }
        Output::Text => {
            let mut text = String::new();
            // Writing to a string does not fail.
            let _ = answer_text(&answer, style(), &mut text);
            out.write_all(text.as_bytes())
        }
    })?;
    Ok(match answer.verdict {
        Verdict::Allowed => ExitCode::SUCCESS,
        _ => ExitCode::from(DENIED),
    })
}

/// Answers each line of a file by a line of JSON; one that cannot be answered by its error.
fn batch(facts: &Facts, file: &Path) -> Result<ExitCode, Error> {
    let failed = |source| Error::Batch {
        path: file.to_owned(),
        source,
    };
    let lines: Box<dyn BufRead> = if file == Path::new("-") {
        Box::new(io::stdin().lock())
    } else {
        Box::new(io::BufReader::new(fs::File::open(file).map_err(failed)?))
    };
    let mut code = ExitCode::SUCCESS;
    let mut unread = None;
    print(|out| {
        for line in lines.lines() {
            let line = match line {
                Ok(line) => line,
                Err(error) => {
                    unread = Some(error);
                    break;
                }
            };
            if line.trim().is_empty() {
                continue;
            }
            let answered = Question::from_line(&line)
                .map_err(Error::from)
                .and_then(|question| Ok(explain(facts, &question)?));
            match answered {
                Ok(answer) => serde_json::to_writer(&mut *out, &answer)?,
                Err(error) => {
                    code = ExitCode::FAILURE;
                    let error = json!({
                        "apiVersion": API_VERSION,
                        "question": line.trim(),
                        "error": error.to_string(),
                    });
                    serde_json::to_writer(&mut *out, &error)?;
                }
            }
            writeln!(out)?;
        }
        Ok(())
    })?;
    unread.map_or(Ok(code), |error| Err(failed(error)))
}

fn list_services(facts: &Facts, asked: &Services) -> Result<ExitCode, Error> {
    let (namespace, name) = match asked.of.as_deref().map(|of| of.split_once('/')) {
        None => (None, None),
        Some(None) => (asked.of.clone(), None),
        Some(Some((namespace, name))) => (Some(namespace.to_owned()), Some(name.to_owned())),
    };
    let filter = ServiceFilter {
        namespace,
        name,
        no_endpoints: asked.no_endpoints,
        refused: asked.refused,
    };
    let rows = services(facts, &filter);
    print(|out| match asked.output {
        Output::Json => {
            let list = json!({ "apiVersion": API_VERSION, "services": rows });
            serde_json::to_writer_pretty(&mut *out, &list)?;
            writeln!(out)
        }
        Output::Text => {
            let mut text = String::new();
            // Writing to a string does not fail.
            let _ = services_text(&rows, style(), &mut text);
            out.write_all(text.as_bytes())
        }
    })?;
    Ok(ExitCode::SUCCESS)
}
