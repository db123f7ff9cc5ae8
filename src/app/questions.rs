//! The commands that answer people's questions.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, BufRead, IsTerminal};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use ipnet::IpNet;
use serde_json::{Value, json};

use super::ask::{self, AskError};
use super::dry_run::collect;
use super::objects::{self, manifests};
use super::{Error, print, reach, single_threaded};
use crate::engine::Engine as _;
use crate::insight::audit::{AuditReport, audit as audit_text};
use crate::insight::status::{Status, status as status_text};
use crate::insight::{
    API_VERSION, Compiled, Facts, OtherNodes, PolicyState, Question, ServiceFilter, Style, Verdict,
    add_states, answer_text, explain, policies, policies_text, services, services_text,
};
use crate::model::{Kind, ObjectName, ObjectRef};
use crate::policies::Engine;
use crate::services::{ServiceSettings, Store};
use crate::settings::file::File;
use crate::settings::{self, Command, CommandLine, Explain, Output, Services, Settings};
use crate::source::Manifests;

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
        let (settings, node_name) = (&of_agent.settings, &of_agent.node);
        let service_settings = objects::service_settings(settings)?;
        // The agent keeps only what its policies need of other Nodes.
        let manifests = Some(of_agent.manifests);
        let collect = collect(settings, node_name, &service_settings, manifests, None);
        let (store, mut engine) = runtime.block_on(collect)?;
        for policy in &of_agent.refused {
            engine.quarantine(policy);
        }
        let is_refused = |service: &ObjectName| {
            let service = ObjectRef::new(Kind::Service, service.clone());
            of_agent.refused.contains(&service)
        };
        let facts = Facts {
            rules,
            is_refused: &is_refused,
            unfiltered: &of_agent.unfiltered,
            ..facts(&store, &service_settings, &engine, node_name, None)
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
    let mut others = OtherNodes::new(service_settings.clone());
    let is_of_nodes = matches!(command, Command::Explain(_) | Command::Reach(_));
    let kept = is_of_nodes.then_some(&mut others);
    let collect = collect(settings, node_name, service_settings, manifests, kept);
    let collected = runtime.block_on(collect);
    // An unanswered DNS query would delay the exit.
    runtime.shutdown_background();
    let (store, engine) = collected?;
    let facts = facts(&store, service_settings, &engine, node_name, Some(&others));
    let facts = Facts { rules, ..facts };
    match of_cluster {
        Some(asked) => asked.answer(&facts, style()),
        None => answer_from(&facts, command, question.as_ref(), Vec::new(), None),
    }
}

fn facts<'a>(
    store: &'a Store,
    settings: &'a ServiceSettings,
    policies: &'a Engine,
    node: &'a str,
    others: Option<&'a OtherNodes>,
) -> Facts<'a> {
    Facts {
        store,
        settings,
        policies,
        node,
        has_node: store.has_node(),
        rules: false,
        most_pairs: None,
        is_refused: &|_| false,
        unfiltered: &[],
        others,
    }
}

/// Returns whether the running agent is asked: no other source of objects is given.
fn is_for_agent(command: &Command, settings: &Settings) -> bool {
    let live = match command {
        Command::Explain(asked) => asked.source.live,
        Command::Policies(asked) => asked.source.live,
        Command::Reach(asked) => asked.source.live,
        Command::Services(asked) => asked.source.live,
        Command::Audit(_) | Command::Status(_) | Command::Completion { .. } | Command::Man => false,
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

/// What answers of the agent depend on.
struct OfAgent {
    node: String,
    settings: Settings,
    manifests: Manifests,
    /// The objects that the kernel refused.
    refused: BTreeSet<ObjectRef>,
    /// The networks of bridges whose packets no rule sees.
    unfiltered: Vec<IpNet>,
}

impl OfAgent {
    /// Asks the agent for its settings and its objects.
    async fn ask(socket: &Path, with_pods: bool) -> Result<Self, Error> {
        let of_agent = ask::get_json(socket, "/settings", &[]).await?;
        let invalid = |what: &str| AskError::Invalid(format!("it lacks {what}"));
        let node = of_agent.get("node").and_then(Value::as_str);
        let node = node.ok_or_else(|| invalid("the node"))?.to_owned();
        let flags = of_agent.get("flags").and_then(Value::as_array);
        let flags = flags.ok_or_else(|| invalid("flags"))?.iter();
        let flags = ["nftlet"]
            .into_iter()
            .chain(flags.filter_map(Value::as_str));
        let mut line = CommandLine::parse(flags)
            .map_err(|error| AskError::Invalid(settings::one_line(&error)))?;
        let configuration = of_agent
            .get("configuration")
            .ok_or_else(|| invalid("settings"))?;
        let file = File::parse(socket, &configuration.to_string())?;
        line.replace(file.settings().clone());
        let pods = if with_pods { "yes" } else { "no" };
        let document = ask::get(socket, "/objects", &[("pods", pods)]).await?;
        let manifests = Manifests::new(Vec::new(), node.clone())
            .with_services(line.settings.services.is_on())
            .with_network_policies(with_pods && line.settings.network_policy.is_on())
            .with_allow_empty(true)
            .with_document(document);
        let unfiltered = of_agent["unfiltered"].as_array().into_iter().flatten();
        Ok(Self {
            node,
            settings: line.settings,
            manifests,
            refused: refused(&of_agent["refused"]),
            unfiltered: unfiltered
                .filter_map(|it| it.as_str()?.parse().ok())
                .collect(),
        })
    }
}

/// Reads the names of the objects that the kernel refused.
fn refused(lists: &Value) -> BTreeSet<ObjectRef> {
    let kinds = [
        ("services", Kind::Service),
        ("networkPolicies", Kind::NetworkPolicy),
        ("clusterNetworkPolicies", Kind::ClusterNetworkPolicy),
    ];
    let of_kind = |(field, kind): (&str, Kind)| {
        let names = lists[field].as_array().cloned().unwrap_or_default();
        let name = move |name: Value| {
            let name = name.as_str()?;
            let (namespace, name) = name.split_once('/').unwrap_or(("", name));
            Some(ObjectRef::new(kind, ObjectName::new(namespace, name)))
        };
        names.into_iter().filter_map(name)
    };
    kinds.into_iter().flat_map(of_kind).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_refused_is_read_as_the_agent_writes_it() {
        let lists = json!({
            "services": ["shop/web"],
            "networkPolicies": ["shop/deny"],
            "clusterNetworkPolicies": ["all"],
        });
        let object = |kind, namespace, name| ObjectRef::new(kind, ObjectName::new(namespace, name));
        let wanted = [
            object(Kind::Service, "shop", "web"),
            object(Kind::NetworkPolicy, "shop", "deny"),
            object(Kind::ClusterNetworkPolicy, "", "all"),
        ];
        assert_eq!(refused(&lists), wanted.into());
        assert_eq!(refused(&Value::Null), BTreeSet::new());
    }
}
