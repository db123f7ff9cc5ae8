//! Network policies: first rules, memory, and changes of pods and policies, by nftlet's clock and
//! from the server, as in the scene `changes`.
//!
//! A remote pod is one of another node that a policy for pods of this node allows. Memory is what is
//! resident beyond that of the same services without policies. Cluster policies are beside the
//! others for first programs, and alone for changes.

use std::time::Duration;

use super::changes::Times;
use super::first::SETTLE;
use crate::Context;
use crate::process::Process;
use crate::report::Value::{Bytes, Ratio, Seconds};
use crate::report::{Report, Table};
use crate::samples::Samples;
use crate::server::{Server, Watched};
use nftlet_lab::cluster::{Cluster, Put, Size, grouped};
use nftlet_lab::fake_api::{CLUSTER_POLICIES, PODS};
use nftlet_lab::netns::Namespace;
use nftlet_lab::pods::{LOCAL, Pod, Pods, cluster_policy, policy};
use serde_json::json;

const POLICY: &str = "nftlet_policy_sync_duration_seconds";
const ASK: Duration = Duration::from_millis(20);
/// First programs with and without cluster policies, in turns.
const TURNS: usize = 5;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Numbers of pods, with commas between.
    #[arg(long, value_delimiter = ',', default_value = "10000,100000",
        value_parser = clap::value_parser!(u32).range(1_000..=1_000_000))]
    pods: Vec<u32>,
    #[arg(long, default_value = "1000", value_parser = clap::value_parser!(u32).range(10..))]
    policies: u32,
    #[arg(long, default_value = "100", value_parser = clap::value_parser!(u16).range(1..=1_000))]
    cluster_policies: u16,
    /// The services that are there as well: services x endpoints of each.
    #[arg(long, default_value = "10000x10")]
    size: Size,
    /// Numbers of policies that select all pods of the node, with commas between.
    #[arg(long, value_delimiter = ',', default_value = "700,2000",
        value_parser = clap::value_parser!(u16).range(1..=20_000))]
    of_all: Vec<u16>,
    /// Single changes of each kind.
    #[arg(long, default_value = "300", value_parser = clap::value_parser!(u32).range(1..))]
    changes: u32,
}

impl Arguments {
    pub fn run(&self, context: &Context) -> Report {
        let parameters: [(_, &dyn ToString); 4] = [
            ("policies", &self.policies),
            ("cluster policies", &self.cluster_policies),
            ("services", &self.size),
            ("changes", &self.changes),
        ];
        let mut report = Report::new("policies", parameters);
        context.progress("start without policies");
        let cluster = Cluster::new(self.size);
        let server = Server::new(Namespace::new("node"), &context.nftlet);
        server.put(cluster.objects());
        let process = server.start().0;
        std::thread::sleep(SETTLE);
        let without = process.memory().resident;
        process.stop();
        drop(server);
        let mut whole = Table::new("Network policies: first rules", "pods");
        let mut single = Table::new("Network policies: changes", "pods");
        for pods in &self.pods {
            let pods = Pods::new(*pods as usize, self.policies as usize);
            self.measure(&cluster, pods, without, context, [&mut whole, &mut single]);
            self.measure_cluster_policies(&cluster, pods, context, [&mut whole, &mut single]);
        }
        for policies in &self.of_all {
            measure_of_all(*policies, self.changes, context, &mut single);
        }
        report.tables = vec![whole, single];
        report
    }

    fn measure(
        &self,
        cluster: &Cluster,
        pods: Pods,
        without: f64,
        context: &Context,
        [whole, single]: [&mut Table; 2],
    ) {
        let of = format!("{} pods", grouped(pods.pods as f64));
        let progress = |step: &str| context.progress(format_args!("{of}  {step}"));
        let server = Server::new(Namespace::new("node"), &context.nftlet);
        server.put(cluster.objects().chain(pods.objects()));
        progress("start");
        let (process, _) = server.start();
        let first = policies_in_force(&process, &server);
        std::thread::sleep(SETTLE);
        let memory = process.memory().resident - without;
        process.stop();
        progress("start with rules in place");
        let (process, _) = server.start();
        let again = policies_in_force(&process, &server);
        let mut note = |what: &str, value| {
            whole.row(what, &of, "nftlet", value);
        };
        note("first program", Seconds(first));
        note("restart, nothing changed", Seconds(again));
        note("memory of policies and pods", Bytes(memory));

        let watched = Watched::new(process, &server);
        let delete = |object: &Put| {
            let object = std::slice::from_ref(object);
            watched.change(1, |server| server.delete(object))
        };
        progress("remote pods");
        let [mut added, mut relabelled, mut removed] = [(); 3].map(|()| Times::default());
        for number in 0..self.changes as usize {
            let pod = pods.later(number);
            added.push(watched.put(pods.object(&pod)));
            let application = pods.later(number + 1).application;
            let other = pods.object(&Pod { application, ..pod });
            relabelled.push(watched.put(other.clone()));
            removed.push(delete(&other));
        }
        added.note("remote pod added", &of, single);
        relabelled.note("remote pod relabelled", &of, single);
        removed.note("remote pod removed", &of, single);
        let mut add_and_remove = |what: &str, object: &dyn Fn(usize) -> Put| {
            progress(what);
            let [mut added, mut removed] = [(); 2].map(|()| Times::default());
            for object in (0..self.changes as usize).map(object) {
                added.push(watched.put(object.clone()));
                removed.push(delete(&object));
            }
            added.note(&format!("{what} added"), &of, single);
            removed.note(&format!("{what} removed"), &of, single);
        };
        add_and_remove("local pod", &|number| {
            let local = true;
            pods.object(&Pod {
                local,
                ..pods.later(number)
            })
        });
        add_and_remove("policy", &|number| {
            pods.another_policy(number % (pods.policies / 2))
        });
        watched.process.stop();
    }

    fn measure_cluster_policies(
        &self,
        cluster: &Cluster,
        pods: Pods,
        context: &Context,
        [whole, single]: [&mut Table; 2],
    ) {
        let of = format!("{} pods", grouped(pods.pods as f64));
        context.progress(format_args!("{of}  cluster policies"));
        let policies = || (0..usize::from(self.cluster_policies)).map(cluster_policy);
        let mut server = Server::new(Namespace::new("node"), &context.nftlet);
        server.put(cluster.objects().chain(pods.objects()));
        let [mut without, mut with] = [(); 2].map(|()| Samples::default());
        for _ in 0..TURNS {
            server.api.remove_api(CLUSTER_POLICIES);
            without.push(first_program(&mut server));
            server.api.add_api(CLUSTER_POLICIES);
            server.put(policies());
            with.push(first_program(&mut server));
        }
        let ratio = Ratio(with.over(&without).median());
        let what = "first program, cluster policies as well";
        whole.row(what, &of, "nftlet", Seconds(with.median()));
        whole.row(format!("{what}, over without"), &of, "nftlet", ratio);

        let pods = Pods {
            policies: 0,
            ..pods
        };
        let server = Server::new(Namespace::new("node"), &context.nftlet);
        server.api.add_api(CLUSTER_POLICIES);
        server.put(cluster.objects().chain(pods.objects()).chain(policies()));
        let (process, _) = server.start();
        policies_in_force(&process, &server);
        let watched = Watched::new(process, &server);
        let mut relabelled = Times::default();
        for number in 0..self.changes as usize {
            let pod = pods.later(number);
            watched.put(pods.object(&pod));
            let application = pods.later(number + 1).application;
            relabelled.push(watched.put(pods.object(&Pod { application, ..pod })));
        }
        let what = "remote pod relabelled, cluster policies alone";
        let row = relabelled.note(what, &of, single);
        row.and("in the kernel", relabelled.kernel());
        watched.process.stop();
    }
}

/// Starts nftlet on another node; returns the seconds that its first comparison took.
fn first_program(server: &mut Server) -> f64 {
    server.another_node();
    let (process, _) = server.start();
    let took = policies_in_force(&process, server);
    process.stop();
    took
}

/// Measures one more policy among those that select all pods of a node.
fn measure_of_all(policies: u16, changes: u32, context: &Context, table: &mut Table) {
    let of = format!("{} policies", grouped(f64::from(policies)));
    context.progress(format_args!("{of} for all pods"));
    let policy_of_all = |number: u16| {
        let ports = json!([{"protocol": "TCP", "port": 1 + number}]);
        let spec = json!({"podSelector": {}, "ingress": [{"ports": ports}]});
        policy("ns-0", &format!("policy-{number}"), spec)
    };
    // A single namespace.
    let pods = Pods::new(1, 0);
    let local = (0..LOCAL).map(|number| {
        let (kind, mut object) = pods.object(&pods.pod(number));
        // As those of a StatefulSet, no two have the same labels.
        object["metadata"]["labels"]["apps.kubernetes.io/pod-index"] = json!(number.to_string());
        (kind, object)
    });
    let server = Server::new(Namespace::new("node"), &context.nftlet);
    server.put(pods.objects().chain(local));
    server.put((0..policies).map(policy_of_all));
    let (process, _) = server.start();
    policies_in_force(&process, &server);
    let watched = Watched::new(process, &server);
    let [mut added, mut removed] = [(); 2].map(|()| Times::default());
    for _ in 0..changes {
        let another = policy_of_all(policies);
        added.push(watched.put(another.clone()));
        let another = std::slice::from_ref(&another);
        removed.push(watched.change(1, |server| server.delete(another)));
    }
    added.note("policy for all pods added", &of, table);
    removed.note("policy for all pods removed", &of, table);
    watched.process.stop();
}

/// Waits until policies are in force; returns the seconds that the first comparison with the
/// kernel took.
pub fn policies_in_force(process: &Process, server: &Server) -> f64 {
    server.runtime.block_on(server.api.until_watched(PODS, 1));
    loop {
        let (sum, count) = process.metrics().histogram(POLICY, "");
        if count > 0 {
            return sum / count as f64;
        }
        std::thread::sleep(ASK);
    }
}
