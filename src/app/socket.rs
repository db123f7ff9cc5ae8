//! What the agent answers on its unix socket.
//!
//! | Page | Answer |
//! |---|---|
//! | `/explain?from=…&to=…` | the answer to one question; with `form=text` as text, in JSON |
//! | `/objects` | the objects that the rules are compiled from, as a list of the API |
//! | `/settings` | the name of the node, and the agent's settings as a configuration file |

use std::collections::HashMap;
use std::sync::Arc;

use hyper::body::Bytes;
use hyper::{StatusCode, Uri};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};

use crate::insight::{Facts, Question, Style, answer_text, explain, objects};
use crate::model::ObjectName;
use crate::policies;
use crate::serve::socket::{SocketAnswer, SocketPages};
use crate::sync::{Look, Query, View};

/// Objects that are copied in one turn of the main loop.
const PORTION: usize = 64;

/// The pages of the socket.
pub(super) struct AgentPages {
    pub ask: mpsc::Sender<Query>,
    pub node_name: Arc<str>,
    /// The settings as a configuration file.
    pub configuration: Value,
}

/// The main loop has ended.
struct Ended;

impl SocketPages for AgentPages {
    async fn get(&self, uri: &Uri) -> Option<SocketAnswer> {
        let query = uri.query().unwrap_or_default();
        let query: HashMap<String, String> = form_urlencoded::parse(query.as_bytes())
            .into_owned()
            .collect();
        match uri.path() {
            "/explain" => Some(self.explain(&query).await),
            "/objects" => Some(self.objects()),
            "/settings" => Some(ok(&json!({
                "node": *self.node_name, "configuration": self.configuration,
            }))),
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
        looked(&self.ask, look).await
    }

    async fn explain(&self, query: &HashMap<String, String>) -> SocketAnswer {
        let word = |name| query.get(name).map_or("", String::as_str);
        let question = match Question::new(word("from"), word("to")) {
            Ok(question) => question,
            Err(error) => return failed(StatusCode::BAD_REQUEST, &error.to_string()),
        };
        let node = self.node_name.clone();
        let answered = self.look(move |view| {
            let nothing = policies::Engine::off(policies::PolicySettings::default());
            let facts = Facts {
                store: view.services.store(),
                settings: view.services.settings(),
                policies: view.policies.unwrap_or(&nothing),
                node: &node,
            };
            explain(&facts, &question)
        });
        let answer = match answered.await {
            Ok(Ok(answer)) => answer,
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
        match serde_json::to_value(&answer) {
            Ok(answer) => ok(&answer),
            Err(error) => failed(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        }
    }

    /// Streams the objects, a portion in each turn of the main loop.
    fn objects(&self) -> SocketAnswer {
        let (parts, answer) = SocketAnswer::parts();
        let ask = self.ask.clone();
        tokio::spawn(async move {
            let mut list = List {
                ask,
                parts,
                first: true,
            };
            // It ends early if the client or the main loop does.
            let _ = list.send_all().await;
        });
        answer
    }
}

async fn looked<T: Send + 'static>(
    ask: &mpsc::Sender<Query>,
    look: impl FnOnce(&View) -> T + Send + 'static,
) -> Result<T, Ended> {
    let (answer, answered) = oneshot::channel();
    let look = Look(Box::new(move |view: &View| {
        // The client may have gone.
        let _ = answer.send(look(view));
    }));
    ask.send(Query::Look(look)).await.map_err(|_| Ended)?;
    answered.await.map_err(|_| Ended)
}

/// A list of objects that is being sent.
struct List {
    ask: mpsc::Sender<Query>,
    parts: mpsc::Sender<Bytes>,
    first: bool,
}

impl List {
    async fn send_all(&mut self) -> Result<(), Ended> {
        self.part("{\"apiVersion\":\"v1\",\"kind\":\"List\",\"items\":[".to_owned())
            .await?;
        let few = looked(&self.ask, |view| {
            let store = view.services.store();
            let mut few: Vec<Value> = store
                .node()
                .iter()
                .map(|node| objects::node(node))
                .collect();
            few.extend(store.service_cidr_objects().map(objects::service_cidr));
            if let Some(policies) = view.policies {
                let namespaces = policies.inventory().namespaces();
                few.extend(namespaces.map(|(name, labels)| objects::namespace(name, &labels)));
            }
            few
        });
        let few = few.await?;
        self.items(few).await?;
        let services = |view: &View| {
            let services = view.services.store().services();
            services.map(|service| service.name.clone()).collect()
        };
        self.each(services, |view, names| {
            let store = view.services.store();
            let mut found = Vec::new();
            for name in names {
                let service = store.service(name);
                found.extend(service.map(|service| objects::service(service)));
                found.extend(store.slices_of(name).all().map(objects::slice));
            }
            found
        })
        .await?;
        let pods = |view: &View| {
            let policies = view.policies.map(|it| it.inventory().pod_names());
            policies.into_iter().flatten().collect()
        };
        self.each(pods, |view, names| {
            let inventory = view.policies.map(policies::Engine::inventory);
            let pods = names.iter().filter_map(|name| inventory?.pod(name));
            pods.map(objects::pod).collect()
        })
        .await?;
        let policies = |view: &View| {
            let policies = view.policies.map(|it| it.inventory().policy_names());
            policies.into_iter().flatten().collect()
        };
        self.each(policies, |view, names| {
            let inventory = view.policies.map(policies::Engine::inventory);
            let policies = names.iter().filter_map(|name| inventory?.policy(name));
            policies
                .map(|policy| objects::network_policy(policy))
                .collect()
        })
        .await?;
        self.part("]}\n".to_owned()).await
    }

    /// Sends the objects with some names.
    async fn each(
        &mut self,
        names: impl FnOnce(&View) -> Vec<ObjectName> + Send + 'static,
        of: fn(&View, &[ObjectName]) -> Vec<Value>,
    ) -> Result<(), Ended> {
        let names = looked(&self.ask, names).await?;
        for portion in names.chunks(PORTION) {
            let portion = portion.to_vec();
            let found = looked(&self.ask, move |view| of(view, &portion)).await?;
            self.items(found).await?;
        }
        Ok(())
    }

    async fn items(&mut self, items: Vec<Value>) -> Result<(), Ended> {
        let mut text = String::new();
        for item in items {
            if !std::mem::take(&mut self.first) {
                text.push_str(",\n");
            }
            text.push_str(&item.to_string());
        }
        self.part(text).await
    }

    async fn part(&mut self, text: String) -> Result<(), Ended> {
        self.parts.send(Bytes::from(text)).await.map_err(|_| Ended)
    }
}
