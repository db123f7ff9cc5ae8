//! What the agent answers on its unix socket.
//!
//! | Page | Answer |
//! |---|---|
//! | `/explain?from=…&to=…` | the answer to one question; with `form=text` as text, in JSON; with `rules=yes` compared with the kernel |
//! | `/status` | the state of the agent |
//! | `/objects` | the objects that the rules are compiled from, as a list of the API; with `pods=no` those of services alone |
//! | `/audit?since=…` | what audited policies would deny, seen within that many seconds |
//! | `/policies` | each policy: since when it is in force, and whether the kernel refused it |
//! | `/settings` | the name of the node, the agent's settings (flags, and a configuration file), and what the kernel refused |

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use hyper::{StatusCode, Uri};
use serde_json::{Value, json};

use super::followers::Audit;
use super::live;
use crate::engine::Engine as _;
use crate::host::addresses;
use crate::host::bridges::unfiltered_networks;
use crate::insight::{Compiled, Facts, NameError, Question, Style, answer_text, explain};
use crate::model::{Kind, ObjectRef};
use crate::policies;
use crate::serve::health::Health;
use crate::serve::socket::{SocketAnswer, SocketPages};
use crate::source::SourceStats;
use crate::sync::View;

mod audit;
mod list;
mod main_loop;
mod status;

use list::{List, Listed};
use main_loop::Ended;
pub(super) use main_loop::MainLoop;
pub(super) use status::DropHistory;

/// The most objects that are copied in one turn of the main loop.
const PORTION: usize = 64;

/// The most pairs of addresses and ports in a question that the main loop answers, in about a
/// millisecond.
const MOST_PAIRS: usize = 100;

/// The pages of the socket.
pub(super) struct AgentPages {
    pub main_loop: Arc<MainLoop>,
    pub node_name: Arc<str>,
    /// The given flags that have no field in a configuration file.
    pub flags: Vec<String>,
    /// The other settings as a configuration file.
    pub configuration: Value,
    pub health: Health,
    /// The address of the API server and the counters of its watches.
    pub server: Option<(String, Arc<SourceStats>)>,
    pub started: Instant,
    pub drops: DropHistory,
    /// None if no policy is audited.
    pub audit: Option<Arc<Audit>>,
}

impl SocketPages for AgentPages {
    async fn get(&self, uri: &Uri) -> Option<SocketAnswer> {
        let query = uri.query().unwrap_or_default();
        let query: HashMap<String, String> = form_urlencoded::parse(query.as_bytes())
            .into_owned()
            .collect();
        if matches!(
            uri.path(),
            "/explain" | "/objects" | "/policies" | "/settings"
        ) {
            let unread = self.look(|view| {
                let mut kinds: Vec<Kind> = view.services.store().missing();
                kinds.extend(view.policies.map(|it| it.missing()).unwrap_or_default());
                kinds.iter().map(|kind| kind.as_str()).collect::<Vec<_>>()
            });
            match unread.await {
                Ok(kinds) if kinds.is_empty() => {}
                Ok(kinds) => {
                    let message = format!(
                        "the agent has not read all objects yet: it waits for the list of {}; see nftlet status",
                        kinds.join(", ")
                    );
                    return Some(failed(StatusCode::SERVICE_UNAVAILABLE, &message));
                }
                Err(Ended) => return Some(ended()),
            }
        }
        match uri.path() {
            "/explain" => Some(self.explain(&query).await),
            "/objects" if query.get("pods").is_some_and(|it| it == "no") => {
                Some(self.stream(Listed::Services))
            }
            "/objects" => Some(self.stream(Listed::Objects)),
            "/policies" => Some(self.stream(Listed::Policies)),
            "/status" => Some(self.status().await),
            "/audit" => Some(self.audited(&query).await),
            "/settings" => Some(self.settings().await),
            _ => None,
        }
    }
}

fn ok(body: &Value) -> SocketAnswer {
    SocketAnswer::Json(StatusCode::OK, body.to_string())
}

fn failed(code: StatusCode, message: &str) -> SocketAnswer {
    SocketAnswer::Json(code, json!({ "error": message }).to_string())
}

fn ended() -> SocketAnswer {
    failed(StatusCode::SERVICE_UNAVAILABLE, "the agent is stopping")
}

impl AgentPages {
    /// Has the main loop look at the objects.
    async fn look<T: Send + 'static>(
        &self,
        look: impl FnOnce(&View) -> T + Send + 'static,
    ) -> Result<T, Ended> {
        self.main_loop.look(look).await
    }

    /// Returns the settings, and what else answers depend on beside the objects.
    async fn settings(&self) -> SocketAnswer {
        let refused = self.look(|view| {
            let services = view.services.refused();
            let services: Vec<String> = services.map(ToString::to_string).collect();
            let policies = view.policies.into_iter();
            let policies: Vec<ObjectRef> = policies
                .flat_map(|engine| engine.refused_policies().cloned())
                .collect();
            (services, policies)
        });
        let Ok((services, policies)) = refused.await else {
            return ended();
        };
        let of_kind = |kind| -> Vec<String> {
            let own = policies.iter().filter(|policy| policy.kind == kind);
            own.map(|policy| policy.name.to_string()).collect()
        };
        let unfiltered = unfiltered_networks(Path::new("/"), &addresses::attached());
        let unfiltered = unfiltered.iter();
        ok(&json!({
            "node": *self.node_name,
            "flags": self.flags,
            "configuration": self.configuration,
            "refused": {
                "services": services,
                "networkPolicies": of_kind(Kind::NetworkPolicy),
                "clusterNetworkPolicies": of_kind(Kind::ClusterNetworkPolicy),
            },
            "unfiltered": unfiltered.map(ToString::to_string).collect::<Vec<_>>(),
        }))
    }

    async fn explain(&self, query: &HashMap<String, String>) -> SocketAnswer {
        let word = |name| query.get(name).map_or("", String::as_str);
        let question = match Question::new(word("from"), word("to")) {
            Ok(question) => question,
            Err(error) => return failed(StatusCode::BAD_REQUEST, &error.to_string()),
        };
        let node = self.node_name.clone();
        let unfiltered = unfiltered_networks(Path::new("/"), &addresses::attached());
        let rules = word("rules") == "yes";
        let answered = self.look(move |view| {
            let nothing = policies::Engine::off(policies::PolicySettings::default());
            let facts = Facts {
                store: view.services.store(),
                settings: view.services.settings(),
                policies: view.policies.unwrap_or(&nothing),
                node: &node,
                has_node: view.services.store().has_node(),
                rules,
                most_pairs: Some(MOST_PAIRS),
                is_refused: &|service| view.services.is_refused(service),
                unfiltered: &unfiltered,
                others: None,
            };
            let (changed, endpoints) = view.pending;
            let answer = explain(&facts, &question, &mut Compiled::default())?;
            Ok((answer, changed + endpoints))
        });
        let answer = match answered.await {
            Ok(Ok((answer, waiting))) if rules => live::ask(answer, waiting).await,
            Ok(Ok((answer, _))) => answer,
            Ok(Err(error @ NameError::TooMany(_))) => {
                return failed(StatusCode::PAYLOAD_TOO_LARGE, &error.to_string());
            }
            Ok(Err(error)) => return failed(StatusCode::NOT_FOUND, &error.to_string()),
            Err(Ended) => return ended(),
        };
        if word("form") == "text" {
            let style = Style {
                colour: word("colour") == "yes",
            };
            let mut text = String::new();
            // Writing to a string does not fail.
            let _ = answer_text(&answer, style, &mut text);
            return ok(&json!({ "verdict": answer.verdict, "text": text }));
        }
        match serde_json::to_string_pretty(&answer) {
            Ok(answer) => SocketAnswer::Json(StatusCode::OK, answer + "\n"),
            Err(error) => failed(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        }
    }

    /// Streams a list, a portion in each turn of the main loop.
    fn stream(&self, of: Listed) -> SocketAnswer {
        let (parts, answer) = SocketAnswer::parts();
        let list = List::new(self.main_loop.clone(), parts);
        tokio::spawn(async move {
            // It ends early if the client or the main loop does.
            let _ = list.send(of).await;
        });
        answer
    }
}
