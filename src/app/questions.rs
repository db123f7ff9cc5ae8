//! The commands that answer people's questions.

use std::fs;
use std::io::{self, BufRead, IsTerminal};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value, json};

use super::ask::{self, AskError};
use super::collected::{Collected, OfAgent};
use super::objects::manifests;
use super::{Error, diff, print, reach, single_threaded};
use crate::insight::audit::{AuditReport, audit as audit_text};
use crate::insight::status::{Status, status as status_text};
use crate::insight::{
    API_VERSION, Compiled, Facts, PolicyState, Question, ServiceFilter, Style, Verdict, add_states,
    answer_text, explain, policies, policies_text, services, services_text,
};
use crate::services::ServiceSettings;
use crate::settings::{self, Command, Explain, Output, Services, Settings};

/// The exit status of a connection that is not allowed.
const DENIED: u8 = 3;
/// The pause between two screens of `nftlet status --watch`.
const WATCH_EVERY: Duration = Duration::from_secs(2);

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
    let of_cluster = match command {
        Command::Reach(asked) => Some(reach::Asked::new(asked, settings)?),
        _ => None,
    };
    if let Command::Diff(asked) = command {
        return diff::answer(asked, settings, node_name, style());
    }
    let rules = matches!(command, Command::Explain(asked) if asked.rules);
    let runtime = single_threaded()?;
    if let Command::Status(asked) = command {
        return runtime.block_on(status(asked, &settings.socket));
    }
    if let Command::Audit(asked) = command {
        return runtime.block_on(audit(asked, &settings.socket));
    }
    if is_for_agent(command, settings) {
        let mut is_too_large = false;
        if let (Command::Explain(asked), Some(_)) = (command, &question) {
            match runtime.block_on(ask_agent(asked, &settings.socket)) {
                // A question that is too large for the agent is answered here.
                Err(Error::Ask(AskError::TooMany)) => is_too_large = true,
                answered => return answered,
            }
        }
        let socket = &settings.socket;
        // The table of services names no pods.
        let with_pods = !matches!(command, Command::Services(asked)
            if asked.of.is_none() && asked.form.output == Output::Text);
        let of_agent = runtime.block_on(OfAgent::ask(socket, with_pods))?;
        let collected = runtime.block_on(of_agent.collect())?;
        let facts = Facts {
            rules,
            ..collected.facts()
        };
        let states = match command {
            Command::Policies(_) => runtime.block_on(states_of_agent(socket))?,
            _ => Vec::new(),
        };
        // Only the agent asks the kernel.
        let warning = (rules && is_too_large)
            .then_some("not compared with the kernel: the question is too large for the agent");
        return match of_cluster {
            Some(asked) => asked.answer(&facts, style()),
            None => answer_from(&facts, command, question.as_ref(), states, warning),
        };
    }
    let without_node = of_cluster.as_ref().map(|_| reach::of_cluster(settings));
    let (settings, node_name) = match &without_node {
        Some(settings) => (settings, ""),
        None => (settings, node_name),
    };
    let manifests = manifests(settings, node_name);
    let with_nodes = matches!(command, Command::Explain(_) | Command::Reach(_));
    let collect = Collected::read(settings, node_name, service_settings, manifests, with_nodes);
    let collected = runtime.block_on(collect);
    // An unanswered DNS query would delay the exit.
    runtime.shutdown_background();
    let collected = collected?;
    let facts = Facts {
        rules,
        ..collected.facts()
    };
    match of_cluster {
        Some(asked) => asked.answer(&facts, style()),
        None => answer_from(&facts, command, question.as_ref(), Vec::new(), None),
    }
}

/// Returns whether the running agent is asked: no other source of objects is given.
fn is_for_agent(command: &Command, settings: &Settings) -> bool {
    let live = match command {
        Command::Explain(asked) => asked.source.live,
        Command::Policies(asked) => asked.source.live,
        Command::Reach(asked) => asked.source.live,
        Command::Services(asked) => asked.source.live,
        Command::Audit(_)
        | Command::Diff(_)
        | Command::Status(_)
        | Command::Completion { .. }
        | Command::Man => false,
    };
    !live
        && settings.manifests.is_empty()
        && settings.kubeconfig.is_none()
        && settings.master.is_none()
}

fn answer_from(
    facts: &Facts,
    command: &Command,
    question: Option<&Question>,
    states: Vec<PolicyState>,
    warning: Option<&str>,
) -> Result<ExitCode, Error> {
    match command {
        Command::Explain(asked) => match (question, &asked.batch) {
            (Some(question), _) => one(facts, question, asked.form.output, warning),
            (None, Some(file)) => batch(facts, file),
            (None, None) => Ok(ExitCode::SUCCESS),
        },
        Command::Policies(asked) => list_policies(facts, asked, states),
        Command::Services(asked) => list_services(facts, asked),
        Command::Audit(_)
        | Command::Diff(_)
        | Command::Reach(_)
        | Command::Status(_)
        | Command::Completion { .. }
        | Command::Man => Ok(ExitCode::SUCCESS),
    }
}

/// Has the agent answer one question.
async fn ask_agent(asked: &Explain, socket: &Path) -> Result<ExitCode, Error> {
    let word = |word: &Option<String>| word.clone().unwrap_or_default();
    let (from, to) = (word(&asked.from), word(&asked.to));
    let colour = if style().colour { "yes" } else { "no" };
    let form = match asked.form.output {
        Output::Text => "text",
        Output::Json => "json",
    };
    let query = [
        ("from", &*from),
        ("to", &*to),
        ("form", form),
        ("colour", colour),
        ("rules", if asked.rules { "yes" } else { "no" }),
    ];
    let body = ask::get(socket, "/explain", &query).await?;
    let answer: Value =
        serde_json::from_slice(&body).map_err(|error| AskError::Invalid(error.to_string()))?;
    print(|out| match answer.get("text").and_then(Value::as_str) {
        Some(text) => out.write_all(text.as_bytes()),
        None => out.write_all(&body),
    })?;
    Ok(match answer.get("verdict").and_then(Value::as_str) {
        Some("allowed") => ExitCode::SUCCESS,
        _ => ExitCode::from(DENIED),
    })
}

/// Shows the state of the agent.
async fn status(asked: &settings::Status, socket: &Path) -> Result<ExitCode, Error> {
    loop {
        let body = ask::get(socket, "/status", &[]).await?;
        let status: Status =
            serde_json::from_slice(&body).map_err(|error| AskError::Invalid(error.to_string()))?;
        print(|out| match asked.form.output {
            Output::Json => {
                serde_json::to_writer_pretty(&mut *out, &status)?;
                writeln!(out)
            }
            Output::Text => {
                let mut text = String::new();
                if asked.watch && style().colour {
                    // Clears the screen.
                    text.push_str("\x1b[H\x1b[2J");
                }
                // Writing to a string does not fail.
                let _ = status_text(&status, style(), &mut text);
                out.write_all(text.as_bytes())
            }
        })?;
        if !asked.watch {
            return Ok(if status.healthy {
                ExitCode::SUCCESS
            } else {
                ExitCode::from(DENIED)
            });
        }
        tokio::time::sleep(WATCH_EVERY).await;
    }
}

/// Shows what audited policies would deny.
async fn audit(asked: &settings::Audit, socket: &Path) -> Result<ExitCode, Error> {
    let since = asked.since.map(|since| since.as_secs().to_string());
    let query = since.as_deref().map(|since| ("since", since));
    let body = ask::get(socket, "/audit", query.as_slice()).await?;
    let report: AuditReport =
        serde_json::from_slice(&body).map_err(|error| AskError::Invalid(error.to_string()))?;
    print(|out| match asked.form.output {
        Output::Json => {
            serde_json::to_writer_pretty(&mut *out, &report)?;
            writeln!(out)
        }
        Output::Text => {
            let mut text = String::new();
            // Writing to a string does not fail.
            let _ = audit_text(&report, style(), &mut text);
            out.write_all(text.as_bytes())
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Returns the state of each policy in the agent.
async fn states_of_agent(socket: &Path) -> Result<Vec<PolicyState>, Error> {
    let mut answer = ask::get_json(socket, "/policies", &[]).await?;
    let states = serde_json::from_value(answer["policies"].take());
    Ok(states.map_err(|error| AskError::Invalid(error.to_string()))?)
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

fn one(
    facts: &Facts,
    question: &Question,
    output: Output,
    warning: Option<&str>,
) -> Result<ExitCode, Error> {
    let mut answer = explain(facts, question, &mut Compiled::default())?;
    answer.warnings.extend(warning.map(str::to_owned));
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
    let mut compiled = Compiled::default();
    let mut text = Vec::new();
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
                .and_then(|question| Ok(explain(facts, &question, &mut compiled)?));
            match answered {
                Ok(answer) => serde_json::to_writer(&mut text, &answer)?,
                Err(error) => {
                    code = ExitCode::FAILURE;
                    let error = json!({
                        "apiVersion": API_VERSION,
                        "question": line.trim(),
                        "error": error.to_string(),
                    });
                    serde_json::to_writer(&mut text, &error)?;
                }
            }
            text.push(b'\n');
            out.write_all(&text)?;
            text.clear();
        }
        Ok(())
    })?;
    unread.map_or(Ok(code), |error| Err(failed(error)))
}

/// Splits NAMESPACE[/NAME].
fn namespace_and_name(of: Option<&str>) -> (Option<&str>, Option<&str>) {
    match of.map(|of| of.split_once('/').ok_or(of)) {
        None => (None, None),
        Some(Err(namespace)) => (Some(namespace), None),
        Some(Ok((namespace, name))) => (Some(namespace), Some(name)),
    }
}

fn list_policies(
    facts: &Facts,
    asked: &settings::Policies,
    states: Vec<PolicyState>,
) -> Result<ExitCode, Error> {
    let (namespace, name) = namespace_and_name(asked.of.as_deref());
    let mut rows = policies(facts, namespace, name)?;
    add_states(&mut rows, states);
    print(|out| match asked.form.output {
        Output::Json => {
            let list = json!({ "apiVersion": API_VERSION, "policies": rows });
            serde_json::to_writer_pretty(&mut *out, &list)?;
            writeln!(out)
        }
        Output::Text => {
            let mut text = String::new();
            // Writing to a string does not fail.
            let _ = policies_text(&rows, style(), &mut text);
            out.write_all(text.as_bytes())
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

fn list_services(facts: &Facts, asked: &Services) -> Result<ExitCode, Error> {
    let (namespace, name) = namespace_and_name(asked.of.as_deref());
    let filter = ServiceFilter {
        namespace: namespace.map(str::to_owned),
        name: name.map(str::to_owned),
        no_endpoints: asked.no_endpoints,
        refused: asked.refused,
    };
    let rows = services(facts, &filter)?;
    print(|out| match asked.form.output {
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
