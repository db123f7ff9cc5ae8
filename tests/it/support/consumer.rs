//! A receiver of a source's events.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nftlet::model::{Delivery, Event, Kind, Notice, Object};
use nftlet::source::cluster::{Cluster, SourceStats, Timing};
use tokio::sync::{mpsc, watch};

use nftlet_lab::fake_api::FakeApi;

pub fn hasty() -> Timing {
    Timing {
        node_wait: Duration::from_secs(60),
        first_pause: Duration::from_millis(5),
        longest_pause: Duration::from_millis(40),
        list_idle: Duration::from_secs(60),
        ..Timing::default()
    }
}

/// The cluster of a kubeconfig, with everything that is read by default.
pub async fn cluster(kubeconfig: &Path, timing: Timing) -> Cluster {
    Cluster::connect(Some(kubeconfig.to_owned()), None, "node-1".to_owned())
        .await
        .expect("a usable kubeconfig")
        .with_timing(timing)
}

/// What a receiver of the events has.
pub struct Consumer {
    pub events: mpsc::Receiver<Delivery>,
    pub stop: watch::Sender<bool>,
    pub task: tokio::task::JoinHandle<()>,
    pub stats: Arc<SourceStats>,
    pub objects: BTreeMap<String, Object>,
    listed: BTreeMap<Kind, BTreeSet<String>>,
    pub complete: BTreeSet<Kind>,
    pub notices: Vec<Notice>,
    /// What happened, in words.
    pub log: Vec<String>,
    _directory: tempfile::TempDir,
}

impl Consumer {
    /// Receives what services are made of.
    pub async fn start(api: &FakeApi, timing: Timing) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let kubeconfig = api.write_kubeconfig(directory.path());
        Self::connect(&kubeconfig, directory, timing).await
    }

    /// Receives what services and network policies are made of.
    pub async fn with_policies(api: &FakeApi, timing: Timing) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let kubeconfig = api.write_kubeconfig(directory.path());
        Self::of(cluster(&kubeconfig, timing).await, directory)
    }

    pub async fn connect(kubeconfig: &Path, directory: tempfile::TempDir, timing: Timing) -> Self {
        let cluster = cluster(kubeconfig, timing).await;
        Self::of(cluster.with_network_policies(false), directory)
    }

    pub fn of(cluster: Cluster, directory: tempfile::TempDir) -> Self {
        let stats = cluster.stats();
        let (sender, events) = mpsc::channel(16);
        let (stop, stopped) = watch::channel(false);
        Self {
            task: tokio::spawn(cluster.run(sender, stopped)),
            events,
            stop,
            stats,
            objects: BTreeMap::new(),
            listed: BTreeMap::new(),
            complete: BTreeSet::new(),
            notices: Vec::new(),
            log: Vec::new(),
            _directory: directory,
        }
    }

    pub fn take(&mut self, event: Event) {
        match event {
            Event::ListStarted(kind) => {
                self.log.push(format!("start {kind}"));
                self.listed.insert(kind, BTreeSet::new());
            }
            Event::ListComplete(kind) => {
                self.log.push(format!("complete {kind}"));
                let listed = self.listed.remove(&kind).expect("a list was started");
                self.objects.retain(|name, object| {
                    object.reference().kind != kind || listed.contains(name)
                });
                self.complete.insert(kind);
            }
            Event::Apply(object) => {
                let name = object.reference().to_string();
                self.log.push(format!("apply {name}"));
                if let Some(listed) = self.listed.get_mut(&object.reference().kind) {
                    listed.insert(name.clone());
                }
                self.objects.insert(name, object);
            }
            Event::Delete(name) => {
                self.log.push(format!("delete {name}"));
                self.objects.remove(&name.to_string());
            }
            Event::Servers(_) | Event::Routes(_) => {}
            Event::Notice(notice) => {
                self.log.push(format!("notice {}", notice.message));
                self.notices.push(notice);
            }
        }
    }

    /// Takes events until a condition holds.
    pub async fn until(&mut self, what: &str, condition: impl Fn(&Self) -> bool) {
        let wait = async {
            while !condition(self) {
                let delivery = self.events.recv().await.expect("the source is running");
                self.take(delivery.event);
            }
        };
        if tokio::time::timeout(Duration::from_secs(120), wait)
            .await
            .is_err()
        {
            panic!("{what} never came; log: {:#?}", self.log);
        }
    }

    /// Waits until everything that services are made of was listed.
    pub async fn ready(&mut self) {
        self.until("the end of the lists", |it| {
            Kind::SERVICES.iter().all(|kind| it.complete.contains(kind))
        })
        .await;
    }

    pub async fn has(&mut self, name: &str) {
        self.until(name, |it| it.objects.contains_key(name)).await;
    }

    pub async fn lacks(&mut self, name: &str) {
        self.until(&format!("the end of {name}"), |it| {
            !it.objects.contains_key(name)
        })
        .await;
    }

    pub fn names(&self) -> Vec<&str> {
        self.objects.keys().map(String::as_str).collect()
    }

    pub fn endpoints(&self, name: &str) -> usize {
        match self.objects.get(name) {
            Some(Object::EndpointSlice(slice)) => slice.endpoints.len(),
            _ => 0,
        }
    }

    pub async fn finish(self) {
        self.stop.send(true).expect("the source is running");
        self.task.await.expect("no panic");
    }
}
