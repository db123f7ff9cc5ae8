//! The binary beside an API server in memory, both inside one network namespace.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::thread;

use serde_json::Value;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::support::manifests::Manifests;
use crate::support::objects::{cidr, node, service, slice};
use nftlet_lab::fake_api::{CIDRS, FakeApi, NODES, SERVICES, SLICES};
pub use nftlet_lab::netns::PATIENCE;
use nftlet_lab::netns::{Daemon, Namespace, wait_for};

/// The binary under test.
pub const NFTLET: &str = env!("CARGO_BIN_EXE_nftlet");

/// A node with an API server on its loopback.
pub struct Node {
    pub ns: Namespace,
    pub api: FakeApi,
    directory: TempDir,
    /// Last, so that the server's tasks have something to end in.
    runtime: Runtime,
}

impl Node {
    /// A node whose server has no objects.
    pub fn new() -> Self {
        let ns = Namespace::new("node");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        // The port is opened on a thread inside the namespace, and stays there.
        let api = ns.run(|| runtime.block_on(FakeApi::start()));
        let directory = tempfile::tempdir().expect("a directory");
        Self {
            ns,
            api,
            directory,
            runtime,
        }
    }

    /// Puts all objects of a directory of manifests on the server.
    pub fn put_all(&self, manifests: &Manifests) {
        for entry in std::fs::read_dir(manifests.path()).expect("a directory") {
            let text = std::fs::read(entry.expect("a file").path()).expect("a file");
            let object: Value = serde_json::from_slice(&text).expect("JSON");
            let path = match object["kind"].as_str() {
                Some("Service") => SERVICES,
                Some("EndpointSlice") => SLICES,
                Some("Node") => NODES,
                Some("ServiceCIDR") => CIDRS,
                other => panic!("the server has no {other:?}"),
            };
            self.api.put(path, object);
        }
    }

    /// A kubeconfig for the server.
    pub fn kubeconfig(&self) -> String {
        let path = self.api.write_kubeconfig(self.directory.path());
        path.into_os_string().into_string().expect("UTF-8")
    }

    /// The arguments with which nftlet works on the server as `node-1`.
    pub fn arguments(&self, more: &[&str]) -> Vec<String> {
        let kubeconfig = self.kubeconfig();
        let fixed = ["--kubeconfig", &kubeconfig, "--hostname-override", "node-1"];
        fixed.iter().chain(more).map(|&it| it.to_owned()).collect()
    }

    /// Starts nftlet on the server, without its HTTP ports.
    #[track_caller]
    pub fn start(&self) -> Daemon {
        let quiet = ["--metrics-bind-address=", "--healthz-bind-address="];
        Daemon::start(&self.ns, NFTLET, self.arguments(&quiet))
    }

    /// Starts nftlet on the server and waits for the first rules.
    #[track_caller]
    pub fn run(&self) -> Daemon {
        let daemon = self.start();
        wait_for_log(&daemon, "the rules are in place");
        daemon
    }

    /// Takes the server away, or brings it back.
    pub fn set_down(&self, down: bool) {
        self.runtime.block_on(self.api.set_down(down));
    }

    /// Waits until the server has refused this many more connections.
    pub fn wait_for_refusals(&self, more: usize) {
        self.runtime.block_on(self.api.until_refused_again(more));
    }

    /// Breaks all connections to the server.
    pub fn break_connections(&self) {
        self.runtime.block_on(self.api.break_connections());
    }

    /// Waits until a collection was asked for a number of times more than now.
    #[track_caller]
    pub fn wait_for_requests(&self, path: &str, more: usize) {
        let enough = self.api.requests_for(path).len() + more;
        wait_for(&format!("{more} requests for {path}"), PATIENCE, || {
            (self.api.requests_for(path).len() >= enough).then_some(())
        });
    }

    /// Waits until the port 80 of an address leads to the port 8080 of exactly these others.
    #[track_caller]
    pub fn leads(&self, address: &str, to: &[&str]) {
        let frontend = format!("{address} . tcp . 80");
        let wanted: BTreeSet<String> = to.iter().map(|it| format!("{it} . 8080")).collect();
        let what = format!("{address} to lead to {to:?}");
        wait_for(&what, PATIENCE, || {
            let all = targets(&self.ns, "ip").into_iter();
            let own = all.filter_map(|(from, to)| (from == frontend).then_some(to));
            (own.collect::<BTreeSet<_>>() == wanted).then_some(())
        });
    }

    /// Waits until the kernel has an element or a rule with this text.
    #[track_caller]
    pub fn has(&self, text: &str) {
        wait_for_rules(&self.ns, text, |rules| rules.contains(text));
    }

    /// Waits until the kernel has nothing with this text.
    #[track_caller]
    pub fn lacks(&self, text: &str) {
        wait_for_rules(&self.ns, &format!("the end of {text}"), |rules| {
            !rules.contains(text)
        });
    }
}

/// A node whose server has the service `a`, 10.96.0.11, with one endpoint, 10.1.0.1.
pub fn small_cluster() -> Node {
    let cluster = Node::new();
    cluster.api.put(NODES, node("node-1", "zone-a"));
    cluster.api.put(CIDRS, cidr("kubernetes", "10.96.0.0/16"));
    cluster.api.put(SERVICES, service("a", "10.96.0.11"));
    cluster.api.put(SLICES, slice("a-1", "a", &["10.1.0.1"]));
    cluster
}

/// What the kernel sends where: frontends of the table of a family with their targets. Which of
/// the targets is the first depends on history, and is left out.
#[track_caller]
pub fn targets(ns: &Namespace, family: &str) -> BTreeSet<(String, String)> {
    let listed = ns.nft(&["list", "map", family, "nftlet", "endpoints"]);
    let lines = listed.lines().filter(|line| !line.contains("typeof"));
    let elements = lines.filter_map(|line| line.split_once(" : "));
    elements
        .filter_map(|(key, target)| {
            let key = key.trim().trim_start_matches("elements = { ");
            let (frontend, _index) = key.rsplit_once(" . ")?;
            let target = target.trim_end_matches([' ', ',', '}']);
            Some((frontend.to_owned(), target.to_owned()))
        })
        .collect()
}

/// Checks that a namespace has the services, targets and hooks that the text of a dry run has.
#[track_caller]
pub fn assert_has(ns: &Namespace, dry_run: &str) {
    let fresh = Namespace::new("fresh");
    fresh.nft_load(dry_run);
    for family in ["ip", "ip6"] {
        let text = |ns: &Namespace, what: &[&str]| ns.nft(&[&["list"], what].concat());
        for what in [
            ["map", family, "nftlet", "frontends"],
            ["set", family, "nftlet", "cluster-ips"],
        ] {
            assert_eq!(text(ns, &what), text(&fresh, &what));
        }
        assert_eq!(targets(ns, family), targets(&fresh, family));
        let table = |ns: &Namespace| text(ns, &["table", family, "nftlet"]);
        let hooks = |ns: &Namespace| lines_with(&table(ns), " hook ");
        assert_eq!(hooks(ns), hooks(&fresh));
        assert_ne!(hooks(ns), Vec::<String>::new());
    }
}

/// All rules of a namespace, as `nft` prints them.
#[track_caller]
pub fn rules(ns: &Namespace) -> String {
    ns.nft(&["list", "ruleset"])
}

/// Waits until the rules are as a closure says.
#[track_caller]
pub fn wait_for_rules(ns: &Namespace, what: &str, right: impl Fn(&str) -> bool) -> String {
    wait_for(what, PATIENCE, || Some(rules(ns)).filter(|it| right(it)))
}

/// Waits until a program has said something.
#[track_caller]
pub fn wait_for_log(daemon: &Daemon, text: &str) {
    wait_for(&format!("the log to say: {text}"), PATIENCE, || {
        daemon.log().contains(text).then_some(())
    });
}

/// The lines of a log that have a text in them.
pub fn lines_with(log: &str, text: &str) -> Vec<String> {
    let lines = log.lines().filter(|line| line.contains(text));
    lines.map(str::to_owned).collect()
}

/// Runs nftlet to its end, with this standard input, and with nothing in the environment that
/// names a cluster or a node.
#[track_caller]
pub fn nftlet<A: AsRef<str>>(ns: &Namespace, arguments: &[A], input: &str) -> Output {
    confined(ns, &[], arguments, input)
}

/// As [`nftlet`], started by `setpriv` with these options.
#[track_caller]
pub fn confined<A: AsRef<str>>(
    ns: &Namespace,
    privileges: &[&str],
    arguments: &[A],
    input: &str,
) -> Output {
    let mut child = ns
        .command("setpriv")
        .args(["--pdeathsig", "KILL"])
        .args(privileges)
        .args(["--", NFTLET])
        .args(arguments.iter().map(AsRef::as_ref))
        .env_remove("KUBECONFIG")
        .env_remove("KUBERNETES_SERVICE_HOST")
        .env_remove("NODE_NAME")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("nftlet can be started");
    let mut stdin = child.stdin.take().expect("standard input is piped");
    thread::scope(|scope| {
        // Where nftlet does not read its standard input, the writing fails.
        scope.spawn(move || stdin.write_all(input.as_bytes()));
        child.wait_with_output()
    })
    .expect("nftlet ends")
}

/// What a successful run printed.
#[track_caller]
pub fn printed(output: &Output) -> String {
    assert!(
        output.status.success(),
        "{}: {}",
        output.status,
        said(output)
    );
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

/// What a run said on standard error.
pub fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Checks that a run failed, printed nothing and said one line, which is returned.
#[track_caller]
pub fn one_line(output: &Output) -> String {
    let said = said(output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "");
    assert_eq!(said.matches('\n').count(), 1, "{said}");
    assert!(
        said.starts_with("nftlet: ") && said.ends_with('\n'),
        "{said}"
    );
    said
}

/// Gets a page; returns the status and the body.
#[track_caller]
pub fn get(ns: &Namespace, address: &str, path: &str) -> (u16, String) {
    let address: SocketAddr = address.parse().expect("an address");
    let mut stream = ns
        .run(|| TcpStream::connect_timeout(&address, PATIENCE))
        .unwrap_or_else(|error| panic!("no connection to {address}: {error}"));
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let request = format!("GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("a request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    (code.expect("a status"), body.to_owned())
}

/// The value of a metric without labels, or with its labels in the printed form.
#[track_caller]
pub fn metric(page: &str, name: &str) -> f64 {
    let line = page
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    let line = line.unwrap_or_else(|| panic!("no {name} in\n{page}"));
    line.trim().parse().expect("a number")
}

/// A file of the repository.
pub fn of_repository(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path)
}
