//! The state of the agent.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper::StatusCode;
use rustix::system::uname;
use tokio::sync::watch;
use tokio::time::Instant;

use super::main_loop::Ended;
use super::{AgentPages, PORTION, ended, failed, ok};
use crate::engine::Engine as _;
use crate::followers::drops::DropCounters;
use crate::insight::API_VERSION;
use crate::insight::status::{self, Status};
use crate::model::{Kind, ObjectName};
use crate::mutex::lock;
use crate::netlink::modules;
use crate::policies::{self, Direction};
use crate::serve::health::Probe;
use crate::serve::socket::SocketAnswer;
use crate::services::Target;
use crate::source::SourceStats;
use crate::sync::View;

/// How long the main loop may take for a look, and the kernel for its counters, before the state is
/// shown without them.
const PATIENCE: Duration = Duration::from_millis(1500);
const COUNTER_PATIENCE: Duration = Duration::from_millis(300);

/// What the main loop knows.
struct Looked {
    rules_in_step: bool,
    pending: usize,
    services: status::Services,
    policies: status::Policies,
}

impl AgentPages {
    pub(super) async fn status(&self) -> SocketAnswer {
        let looked = match self.looked().await {
            Ok(looked) => looked,
            Err(Ended) => return ended(),
        };
        let [synced, last_audit] = self.health.times();
        let probes = [Probe::Healthz, Probe::Readyz].map(|probe| self.health.status(probe));
        let mut reasons: Vec<String> = Vec::new();
        if looked.is_none() {
            reasons.push(format!(
                "the main loop has not answered for {} s; see the log",
                self.main_loop.silent_seconds()
            ));
        }
        for reason in probes.iter().filter_map(|status| status.message.clone()) {
            if !reasons.contains(&reason) {
                reasons.push(reason);
            }
        }
        let in_step = looked
            .as_ref()
            .is_some_and(|it| it.rules_in_step && it.pending == 0);
        let mut status = Status {
            api_version: API_VERSION.to_owned(),
            node: self.node_name.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel: uname().release().to_string_lossy().into_owned(),
            up_seconds: self.started.elapsed().as_secs(),
            healthy: looked.is_some() && probes.iter().all(|status| status.healthy),
            reasons,
            api_server: self
                .server
                .as_ref()
                .map(|(url, stats)| api_server(url, stats)),
            rules: status::Rules {
                in_sync_since: synced.filter(|_| in_step),
                pending: looked.as_ref().map(|it| it.pending),
                last_audit,
            },
            services: looked.as_ref().map(|it| it.services.clone()),
            policies: looked.map(|it| it.policies),
            conntrack: conntrack(),
            settings: kernel_settings(),
            modules: modules().into_iter().map(str::to_owned).collect(),
            drops: self.drops.recent().await,
            warnings: Vec::new(),
        };
        status.judge();
        match serde_json::to_value(&status) {
            Ok(status) => ok(&status),
            Err(error) => failed(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        }
    }

    /// Returns what the main loop knows; `None` if it does not answer.
    async fn looked(&self) -> Result<Option<Looked>, Ended> {
        let deadline = Instant::now() + PATIENCE;
        let names = self.look_until(deadline, |view| {
            let services = view.services.store().services();
            services
                .map(|service| service.name.clone())
                .collect::<Vec<_>>()
        });
        let Some(names) = names.await? else {
            return Ok(None);
        };
        let mut services = status::Services {
            total: names.len(),
            ..status::Services::default()
        };
        for portion in names.chunks(PORTION) {
            let portion = portion.to_vec();
            let counted = self.look_until(deadline, move |view| count(view, &portion));
            let Some(counted) = counted.await? else {
                return Ok(None);
            };
            services.frontends += counted.frontends;
            services.endpoints += counted.endpoints;
            services.without_endpoints += counted.without_endpoints;
        }
        self.look_until(deadline, move |view| {
            let (changed, endpoints) = view.pending;
            services.refused = view.services.left_out();
            Looked {
                rules_in_step: view.services_in_step,
                pending: changed + endpoints,
                services,
                policies: policies(view),
            }
        })
        .await
    }

    /// Has the main loop look at the objects; `None` if it does not in time.
    async fn look_until<T: Send + 'static>(
        &self,
        deadline: Instant,
        look: impl FnOnce(&View) -> T + Send + 'static,
    ) -> Result<Option<T>, Ended> {
        match tokio::time::timeout_at(deadline, self.look(look)).await {
            Ok(looked) => looked.map(Some),
            Err(_) => Ok(None),
        }
    }
}

fn policies(view: &View) -> status::Policies {
    let policies = view.policies.filter(|engine| engine.is_on());
    let isolated = policies.into_iter().flat_map(|engine| engine.isolated());
    let isolated: BTreeSet<ObjectName> = isolated.filter_map(|(_, pod)| pod.cloned()).collect();
    status::Policies {
        total: policies.map_or(0, |engine| {
            engine.count(Kind::NetworkPolicy) + engine.count(Kind::ClusterNetworkPolicy)
        }),
        isolated_pods: isolated.len(),
        audited: policies.map_or(0, |engine| {
            let all = engine.inventory().policies();
            all.filter(|policy| engine.is_audited(policy)).count()
        }),
        refused: policies.map_or(0, policies::Engine::refused),
        in_force: policies.is_none_or(|engine| engine.is_ready()) && view.policies_in_step,
    }
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
pub(in crate::app) struct DropHistory {
    counters: Option<Arc<DropCounters>>,
    readings: Mutex<Readings>,
}

impl DropHistory {
    pub(in crate::app) fn new(counters: Option<Arc<DropCounters>>) -> Self {
        Self {
            counters,
            readings: Mutex::default(),
        }
    }

    /// Reads the counters at intervals until `stop` is true.
    pub(in crate::app) async fn follow(&self, mut stop: watch::Receiver<bool>) {
        if self.counters.is_none() {
            return;
        }
        loop {
            if let Some(now) = self.read().await {
                let mut readings = lock(&self.readings);
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
        let read = tokio::time::timeout(COUNTER_PATIENCE, read).await;
        read.ok()?.ok().flatten()
    }

    /// Returns what was dropped since the oldest reading, the most first.
    async fn recent(&self) -> Vec<status::Drop> {
        let Some(now) = self.read().await else {
            return Vec::new();
        };
        let readings = lock(&self.readings);
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

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use serde_json::Value;
    use tokio::sync::mpsc;

    use super::super::MainLoop;
    use super::*;
    use crate::serve::health::{Health, PERIOD};
    use crate::services::{self, ServiceSettings};
    use crate::sync::{Look, PolicyTimes, Query};

    /// The pages of an agent whose rules are in force, and the questions to its main loop.
    fn pages() -> (AgentPages, mpsc::Receiver<Query>) {
        let (ask, queries) = mpsc::channel(1);
        let health = Health::new(PERIOD);
        health.synced();
        let stats = Arc::new(SourceStats::default());
        let pages = AgentPages {
            main_loop: Arc::new(MainLoop::new(ask)),
            node_name: "node-1".into(),
            flags: Vec::new(),
            configuration: Value::Null,
            health,
            server: Some(("https://192.0.2.1".to_owned(), stats)),
            started: Instant::now(),
            drops: DropHistory::new(None),
            audit: None,
        };
        (pages, queries)
    }

    async fn status(pages: &AgentPages) -> Value {
        match pages.status().await {
            SocketAnswer::Json(StatusCode::OK, body) => serde_json::from_str(&body).expect("JSON"),
            _ => panic!("no state"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn without_the_main_loop_the_rest_is_shown_in_time() {
        let (pages, mut queries) = pages();
        let begun = tokio::time::Instant::now();
        let first = status(&pages).await;
        assert!(begun.elapsed() < Duration::from_secs(2));
        assert_eq!(first["healthy"], false);
        let reason =
            |seconds| format!("the main loop has not answered for {seconds} s; see the log");
        assert_eq!(first["reasons"][0], reason(1));
        assert_eq!(first["node"], "node-1");
        assert_eq!(first["apiServer"]["url"], "https://192.0.2.1");
        for unknown in ["services", "policies"] {
            assert!(first[unknown].is_null(), "{first}");
        }
        assert!(first["rules"]["pending"].is_null(), "{first}");
        assert!(first["rules"]["inSyncSince"].is_null(), "{first}");
        tokio::time::advance(Duration::from_secs(60)).await;
        let second = status(&pages).await;
        // With the patience for each of the two.
        assert_eq!(second["reasons"][0], reason(63));

        // It goes on.
        let main_loop = async {
            let services = services::Engine::new(ServiceSettings::default());
            let times = PolicyTimes::default();
            while let Some(Query::Look(Look(look))) = queries.recv().await {
                look(&View::of(&services, None, &times));
            }
        };
        let third = tokio::select! {
            () = main_loop => panic!("the pages were dropped"),
            third = status(&pages) => third,
        };
        assert_eq!(third["healthy"], true, "{third}");
        assert_eq!(third["services"]["total"], 0);
        assert_eq!(pages.main_loop.silent_seconds(), 0);
    }
}
