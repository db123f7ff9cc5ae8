//! What the agent answers on its unix socket.
//!
//! | Page | Answer |
//! |---|---|
//! | `/explain?from=…&to=…` | the answer to one question; with `form=text` as text, in JSON |
//! | `/status` | the state of the agent |
//! | `/objects` | the objects that the rules are compiled from, as a list of the API |
//! | `/policies` | each policy: since when it is in force, and whether the kernel refused it |
//! | `/settings` | the name of the node, and the agent's settings: flags, and a configuration file |

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hyper::{StatusCode, Uri};
use rustix::system::uname;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot, watch};

use crate::engine::Engine as _;
use crate::followers::drops::DropCounters;
use crate::host::addresses;
use crate::host::bridges::unfiltered_networks;
use crate::insight::status::{self, Status};
use crate::insight::{API_VERSION, Facts, NameError, Plans, Question, Style, answer_text, explain};
use crate::model::{Kind, ObjectName};
use crate::policies::{self, Direction};
use crate::serve::health::{Health, Probe};
use crate::serve::socket::{SocketAnswer, SocketPages};
use crate::services::Target;
use crate::source::SourceStats;
use crate::sync::{Look, Query, View};

mod list;

use list::{List, Listed};

/// The most objects that are copied in one turn of the main loop.
const PORTION: usize = 64;

/// The most pairs of addresses and ports in a question that the main loop answers, in about a
/// millisecond.
const MOST_PAIRS: usize = 100;

/// The pages of the socket.
pub(super) struct AgentPages {
    pub ask: mpsc::Sender<Query>,
    /// Held while the main loop looks, so that other events have their turn in between.
    pub turn: Arc<tokio::sync::Mutex<()>>,
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
}

/// The main loop has ended.
struct Ended;

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
            "/objects" => Some(self.stream(Listed::Objects)),
            "/policies" => Some(self.stream(Listed::Policies)),
            "/status" => Some(self.status().await),
            "/settings" => Some(ok(&json!({
                "node": *self.node_name, "flags": self.flags,
                "configuration": self.configuration,
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
        looked(&self.ask, &self.turn, look).await
    }

    async fn explain(&self, query: &HashMap<String, String>) -> SocketAnswer {
        let word = |name| query.get(name).map_or("", String::as_str);
        let question = match Question::new(word("from"), word("to")) {
            Ok(question) => question,
            Err(error) => return failed(StatusCode::BAD_REQUEST, &error.to_string()),
        };
        let node = self.node_name.clone();
        let unfiltered = unfiltered_networks(Path::new("/"), &addresses::attached());
        let answered = self.look(move |view| {
            let nothing = policies::Engine::off(policies::PolicySettings::default());
            let facts = Facts {
                store: view.services.store(),
                settings: view.services.settings(),
                policies: view.policies.unwrap_or(&nothing),
                node: &node,
                has_node: view.services.store().has_node(),
                most_pairs: Some(MOST_PAIRS),
                is_refused: &|service| view.services.is_refused(service),
                unfiltered: &unfiltered,
                others: None,
            };
            explain(&facts, &question, &mut Plans::default())
        });
        let answer = match answered.await {
            Ok(Ok(answer)) => answer,
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

    async fn status(&self) -> SocketAnswer {
        let names = self.look(|view| {
            let services = view.services.store().services();
            services
                .map(|service| service.name.clone())
                .collect::<Vec<_>>()
        });
        let Ok(names) = names.await else {
            return ended();
        };
        let mut services = status::Services::default();
        for portion in names.chunks(PORTION) {
            let portion = portion.to_vec();
            let counted = self.look(move |view| count(view, &portion)).await;
            let Ok(counted) = counted else {
                return ended();
            };
            services.frontends += counted.frontends;
            services.endpoints += counted.endpoints;
            services.without_endpoints += counted.without_endpoints;
        }
        let looked = self.look(|view| {
            let policies = view.policies.filter(|engine| engine.is_on());
            let isolated = policies.into_iter().flat_map(|engine| engine.isolated());
            let isolated: BTreeSet<ObjectName> =
                isolated.filter_map(|(_, pod)| pod.cloned()).collect();
            let policies = status::Policies {
                total: policies.map_or(0, |engine| {
                    engine.count(Kind::NetworkPolicy) + engine.count(Kind::ClusterNetworkPolicy)
                }),
                isolated_pods: isolated.len(),
                refused: policies.map_or(0, policies::Engine::refused),
                in_force: policies.is_none_or(|engine| engine.is_ready()) && view.policies_in_step,
            };
            let (changed, endpoints) = view.pending;
            let refused = view.services.left_out();
            (
                policies,
                refused,
                changed + endpoints,
                view.services_in_step,
            )
        });
        let Ok((policies, refused, pending, in_step)) = looked.await else {
            return ended();
        };
        services.total = names.len();
        services.refused = refused;
        let [synced, last_audit] = self.health.times();
        let probes = [Probe::Healthz, Probe::Readyz].map(|probe| self.health.status(probe));
        let mut reasons: Vec<String> = Vec::new();
        for reason in probes.iter().filter_map(|status| status.message.clone()) {
            if !reasons.contains(&reason) {
                reasons.push(reason);
            }
        }
        let mut status = Status {
            api_version: API_VERSION.to_owned(),
            node: self.node_name.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel: uname().release().to_string_lossy().into_owned(),
            up_seconds: self.started.elapsed().as_secs(),
            healthy: probes.iter().all(|status| status.healthy),
            reasons,
            api_server: self
                .server
                .as_ref()
                .map(|(url, stats)| api_server(url, stats)),
            rules: status::Rules {
                in_sync_since: synced.filter(|_| in_step && pending == 0),
                pending,
                last_audit,
            },
            services,
            policies,
            conntrack: conntrack(),
            settings: kernel_settings(),
            drops: self.drops.recent().await,
            warnings: Vec::new(),
        };
        status.judge();
        match serde_json::to_value(&status) {
            Ok(status) => ok(&status),
            Err(error) => failed(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        }
    }

    /// Streams a list, a portion in each turn of the main loop.
    fn stream(&self, of: Listed) -> SocketAnswer {
        let (parts, answer) = SocketAnswer::parts();
        let list = List::new(self.ask.clone(), self.turn.clone(), parts);
        tokio::spawn(async move {
            // It ends early if the client or the main loop does.
            let _ = list.send(of).await;
        });
        answer
    }
}

async fn looked<T: Send + 'static>(
    ask: &mpsc::Sender<Query>,
    turn: &tokio::sync::Mutex<()>,
    look: impl FnOnce(&View) -> T + Send + 'static,
) -> Result<T, Ended> {
    let _turn = turn.lock().await;
    let (answer, answered) = oneshot::channel();
    let look = Look(Box::new(move |view: &View| {
        // The client may have gone.
        let _ = answer.send(look(view));
    }));
    ask.send(Query::Look(look)).await.map_err(|_| Ended)?;
    answered.await.map_err(|_| Ended)
}

/// Counts frontends and endpoints of some services.
fn count(view: &View, names: &[ObjectName]) -> status::Services {
    let mut counted = status::Services::default();
    for plan in names.iter().filter_map(|name| view.services.plan(name)) {
        let used: BTreeSet<Target> = plan
            .pools
            .iter()
            .flat_map(|pool| pool.targets.iter().copied())
            .collect();
        counted.frontends += plan.frontends.len();
        counted.endpoints += used.len();
        counted.without_endpoints += usize::from(used.is_empty() && !plan.frontends.is_empty());
    }
    counted
}

fn api_server(url: &str, stats: &SourceStats) -> status::ApiServer {
    let watched = Kind::ALL
        .iter()
        .filter(|kind| stats.kind(**kind).watches() > 0);
    let last = Kind::ALL
        .iter()
        .filter_map(|kind| stats.kind(*kind).last_event())
        .max();
    let faulty = Kind::ALL
        .iter()
        .filter(|kind| stats.fault_of(**kind).is_some());
    let kinds: BTreeSet<Kind> = watched.chain(faulty).copied().collect();
    let watch = |kind: Kind| status::Watch {
        kind: kind.as_str().to_owned(),
        fault: stats.fault_of(kind),
    };
    status::ApiServer {
        url: url.to_owned(),
        watches: kinds.into_iter().map(watch).collect(),
        last_event_seconds: last.map(|at| at.elapsed().as_secs()),
    }
}

fn parameter(path: &str) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/sys/{}", path.replace('.', "/"))).ok()?;
    Some(text.trim().to_owned())
}

fn conntrack() -> Option<status::Conntrack> {
    let number = |name: &str| parameter(&format!("net.netfilter.{name}"))?.parse().ok();
    Some(status::Conntrack {
        used: number("nf_conntrack_count")?,
        max: number("nf_conntrack_max")?,
    })
}

/// Kernel parameters that decide whether packets of pods arrive, with the value that they need.
const PARAMETERS: [(&str, Option<&str>); 4] = [
    ("net.ipv4.ip_forward", Some("1")),
    ("net.ipv6.conf.all.forwarding", None),
    ("net.ipv4.conf.all.rp_filter", None),
    ("net.bridge.bridge-nf-call-iptables", None),
];

/// Returns the parameters that this kernel has.
fn kernel_settings() -> Vec<status::Setting> {
    let found = PARAMETERS.iter().filter_map(|(name, wanted)| {
        let value = parameter(name)?;
        Some(status::Setting {
            name: (*name).to_owned(),
            wanted: wanted.filter(|wanted| value != *wanted).map(str::to_owned),
            value,
        })
    });
    found.collect()
}

/// The interval of readings of the counters of dropped packets, and the number that is kept: those of
/// five minutes.
const READ_EVERY: Duration = Duration::from_secs(60);
const READINGS: usize = 5;

/// Readings of the counters of dropped packets, the oldest first.
type Readings = VecDeque<BTreeMap<(ObjectName, Direction), u64>>;

/// Dropped packets over the last minutes.
pub(super) struct DropHistory {
    counters: Option<Arc<DropCounters>>,
    readings: Mutex<Readings>,
}

impl DropHistory {
    pub(super) fn new(counters: Option<Arc<DropCounters>>) -> Self {
        Self {
            counters,
            readings: Mutex::default(),
        }
    }

    /// Reads the counters at intervals until `stop` is true.
    pub(super) async fn follow(&self, mut stop: watch::Receiver<bool>) {
        if self.counters.is_none() {
            return;
        }
        loop {
            if let Some(now) = self.read().await {
                let mut readings = self.readings.lock().unwrap_or_else(PoisonError::into_inner);
                if readings.len() == READINGS {
                    readings.pop_front();
                }
                readings.push_back(now);
            }
            tokio::select! {
                _ = stop.wait_for(|stop| *stop) => return,
                () = tokio::time::sleep(READ_EVERY) => {}
            }
        }
    }

    async fn read(&self) -> Option<BTreeMap<(ObjectName, Direction), u64>> {
        let counters = self.counters.clone()?;
        let read = tokio::task::spawn_blocking(move || counters.read());
        read.await.ok().flatten()
    }

    /// Returns what was dropped since the oldest reading, the most first.
    async fn recent(&self) -> Vec<status::Drop> {
        let Some(now) = self.read().await else {
            return Vec::new();
        };
        let readings = self.readings.lock().unwrap_or_else(PoisonError::into_inner);
        let before = readings.front();
        let drops = now.into_iter().map(|((pod, direction), packets)| {
            let earlier = before.and_then(|it| it.get(&(pod.clone(), direction)));
            status::Drop {
                pod: pod.to_string(),
                direction: direction.as_str().to_owned(),
                packets: packets.saturating_sub(earlier.copied().unwrap_or_default()),
            }
        });
        let mut drops: Vec<status::Drop> = drops.filter(|drop| drop.packets > 0).collect();
        drops.sort_by_key(|drop| Reverse(drop.packets));
        drops
    }
}
