//! The commands that answer questions: from a dump, and from the running agent. All times are those
//! of whole processes, from their start to their end.

use std::fmt::Write as _;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use super::policies::policies_in_force;
use crate::Context;
use crate::report::Value::{Bytes, Number, Seconds};
use crate::report::{Report, Table};
use crate::samples::Samples;
use crate::server::Server;
use nftlet_lab::cluster::{Cluster, NODE, POD_CIDRS, Put, Random, Size};
use nftlet_lab::netns::Namespace;
use nftlet_lab::pods::Pods;
use serde_json::json;

/// Questions for the time of the main thread.
const ASKED: u32 = 1_000;
/// The exit codes of an answer: allowed or healthy, and denied or degraded.
const ANSWERED: [i32; 2] = [0, 3];

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The services of the dump: services x endpoints of each.
    #[arg(long, default_value = "1000x10")]
    dump: Size,
    /// The services of the running agent.
    #[arg(long, default_value = "10000x10")]
    live: Size,
    #[arg(long, default_value = "10000", value_parser = clap::value_parser!(u32).range(1_000..))]
    pods: u32,
    #[arg(long, default_value = "1000", value_parser = clap::value_parser!(u32).range(10..))]
    policies: u32,
    /// Questions of a batch.
    #[arg(long, default_value = "20000", value_parser = clap::value_parser!(u32).range(1..))]
    questions: u32,
    /// How often each command runs.
    #[arg(long, default_value = "11", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
}

impl Arguments {
    pub fn run(&self, context: &Context) -> Report {
        let parameters: [(_, &dyn ToString); 4] = [
            ("pods", &self.pods),
            ("policies", &self.policies),
            ("questions", &self.questions),
            ("rounds", &self.rounds),
        ];
        let mut report = Report::new("insight", parameters);
        let pods = Pods::new(self.pods as usize, self.policies as usize);
        let mut table = Table::new("Answers", "services");
        self.ask_a_dump(&pods, context, &mut table);
        self.ask_the_agent(&pods, context, &mut table);
        report.tables.push(table);
        report
    }

    fn ask_a_dump(&self, pods: &Pods, context: &Context, table: &mut Table) {
        context.progress(format_args!("{}  dump", self.dump));
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str| directory.path().join(name);
        let cluster = Cluster::new(self.dump);
        let objects = cluster.objects().chain(pods.objects());
        let items: Vec<_> = objects.map(|(_, object)| object).collect();
        let list = json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string();
        let of = self.dump;
        table.row("size of the dump", of, "nftlet", Bytes(list.len() as f64));
        fs::write(at("dump.json"), list).expect("the dump is written");

        let dump = at("dump.json");
        let run = |words: &[&str]| {
            let facts = [
                format!("--manifests={}", dump.display()),
                format!("--hostname-override={NODE}"),
                format!("--cluster-cidr={}", POD_CIDRS.join(",")),
            ];
            run(&context.nftlet, words, &facts)
        };
        let (from, to) = question(pods, self.dump, &mut Random::default());
        let one = self.times(|| run(&["explain", &from, &to]));
        table.row("start to answer", of, "nftlet", Seconds(one.median()));

        let mut random = Random::default();
        let mut batch = String::new();
        for _ in 0..self.questions {
            let (from, to) = question(pods, self.dump, &mut random);
            let _ = writeln!(batch, "{from} {to}");
        }
        fs::write(at("batch"), batch).expect("the batch is written");
        let batch = at("batch");
        let batch = batch.to_str().expect("UTF-8");
        let all = self.times(|| run(&["explain", "--batch", batch]));
        let each = (all.median() - one.median()) / f64::from(self.questions);
        table.row(
            "questions a second, once loaded",
            of,
            "nftlet",
            Number(1.0 / each),
        );
        for command in ["services", "policies"] {
            let times = self.times(|| run(&[command]));
            table.row(
                format!("nftlet {command}"),
                of,
                "nftlet",
                Seconds(times.median()),
            );
        }
    }

    fn ask_the_agent(&self, pods: &Pods, context: &Context, table: &mut Table) {
        context.progress(format_args!("{}  agent", self.live));
        let cluster = Cluster::new(self.live);
        let server = Server::new(Namespace::new("node"), &context.nftlet);
        server.put(
            cluster
                .objects()
                .chain(pods.objects())
                .collect::<Vec<Put>>(),
        );
        let (process, _) = server.start();
        policies_in_force(&process, &server);
        let socket = [format!("--socket={}", server.socket().display())];
        let run = |words: &[&str]| run(&context.nftlet, words, &socket);
        let (from, to) = question(pods, self.live, &mut Random::default());
        for (what, words) in [
            ("agent: explain", &["explain", &*from, &*to][..]),
            ("agent: status", &["status"]),
            ("agent: services", &["services"]),
            ("agent: policies", &["policies"]),
        ] {
            let times = self.times(|| run(words));
            table.row(what, self.live, "nftlet", Seconds(times.median()));
        }
        let mut random = Random::default();
        let before = process.main_thread();
        for _ in 0..ASKED {
            let (from, to) = question(pods, self.live, &mut random);
            ask(&server.socket(), &from, &to);
        }
        let each = (process.main_thread() - before) / f64::from(ASKED);
        table.row(
            "agent: main thread, a question",
            self.live,
            "nftlet",
            Seconds(each),
        );
        process.stop();
    }

    fn times(&self, run: impl Fn()) -> Samples {
        let time = |_| {
            let started = Instant::now();
            run();
            started.elapsed().as_secs_f64()
        };
        (0..self.rounds).map(time).collect()
    }
}

/// Returns a random pod and a random service.
fn question(pods: &Pods, size: Size, random: &mut Random) -> (String, String) {
    let (namespace, name) = pods.name(&pods.pod(random.below(pods.pods)));
    let (of_service, service) = Cluster::name(random.below(size.services));
    let to = format!("svc/{of_service}/{service}");
    (format!("{namespace}/{name}"), to)
}

/// Asks the agent for an explanation.
fn ask(socket: &Path, from: &str, to: &str) {
    let mut stream = UnixStream::connect(socket).expect("the agent listens");
    let request = format!(
        "GET /explain?from={from}&to={to} HTTP/1.1\r\nhost: nftlet\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).expect("it is sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

/// Runs a command to its end.
fn run(nftlet: &Path, words: &[&str], facts: &[String]) {
    let mut command = Command::new(nftlet);
    command.args(words).args(facts).env_remove("NODE_NAME");
    command.stdout(Stdio::null());
    let output = command.output().expect("nftlet runs");
    let code = output.status.code();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        code.is_some_and(|it| ANSWERED.contains(&it)),
        "{words:?}: {said}"
    );
}
