//! Network namespaces: hosts, links and traffic for tests, all in this process.
//!
//! ```text
//!   client 192.168.10.100 ──┐                      ┌── pod-1 10.244.1.11
//!                           ├─ fabric ─ node-1 ────┼── pod-2 10.244.1.12
//!   node-2 192.168.10.2 ────┘  (bridge) 192.168.10.1 └── pod-3 10.244.1.13
//! ```
//!
//! [`Lab`] builds that picture, [`Server`] answers in a pod, [`Ask`] asks from wherever the thread
//! is (see [`Namespace::run`] and [`Client`]), [`Daemon`] runs a program in a node.
//!
//! A [`Namespace`] has no name in the file system: it lives as long as a file descriptor of this
//! process (or a process inside it) does. Nothing is left behind, whichever way the process ends,
//! and tests may run in parallel without agreeing on names.
//!
//! Configuration errors panic: a test that cannot build its network has nothing to report but that.

mod daemon;
mod lab;
mod traffic;

use std::fs::File;
use std::io::Write as _;
use std::net::IpAddr;
use std::os::fd::AsRawFd as _;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns, unshare};

pub use daemon::Daemon;
pub use lab::{Lab, LabOptions, Machine, Node, Pod};
pub use traffic::{Answer, Ask, Client, HttpConnection, Protocol, Server, drain};

/// How long to wait for what is sure to come: a bound that only a failing test reaches, and no
/// machine however slow.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Returns whether this process may create and configure network namespaces.
///
/// Every test that uses the harness starts with
///
/// ```ignore
/// if !require_net_admin() { return }
/// ```
///
/// Without the right, the test is skipped, which is said on standard error past the test
/// runner's capture. Where the environment has `CI=true` a test is never skipped: it panics.
#[must_use = "a test without the right must return"]
pub fn require_net_admin() -> bool {
    static REFUSAL: OnceLock<Option<String>> = OnceLock::new();
    let refusal = REFUSAL.get_or_init(|| {
        let attempt = thread::spawn(|| unshare(CloneFlags::CLONE_NEWNET)).join();
        match attempt.expect("the probing thread does not panic") {
            Ok(()) => None,
            Err(error) => Some(format!("creating a network namespace fails: {error}")),
        }
    });
    let Some(refusal) = refusal else { return true };
    let name = thread::current().name().unwrap_or("a test").to_owned();
    if std::env::var("CI").is_ok_and(|v| v == "true" || v == "1") {
        panic!("{name} cannot run, and CI skips nothing: {refusal}");
    }
    // Written to the descriptor itself: the print macros are captured for tests that pass.
    let _ = writeln!(
        std::io::stderr(),
        "\nSKIPPED {name}: {refusal}. Run `make test`, or `scripts/with-runner.sh cargo test`, \
         or as root.",
    );
    false
}

/// A network namespace with its loopback up; clones are handles to the same one.
///
/// It goes away with its last handle, and with it its links, addresses and rules.
#[derive(Clone, Debug)]
pub struct Namespace {
    name: Arc<str>,
    file: Arc<File>,
}

impl Namespace {
    /// Creates a namespace. The name is for messages only and need not be unique.
    #[track_caller]
    pub fn new(name: &str) -> Self {
        // A thread of its own moves into the new namespace, so that the caller stays where it is.
        let file = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net")
        })
        .join()
        .expect("the creating thread does not panic")
        .unwrap_or_else(|error| panic!("cannot create the network namespace {name}: {error}"));
        let namespace = Self {
            name: format!("{name}-{}", std::process::id()).into(),
            file: Arc::new(file),
        };
        // Addresses must be usable at once (no duplicate detection) and answers must not be
        // thinned out: the kernel limits ICMP errors per second, by peer and in all, which would
        // make rejected requests look like dropped ones.
        namespace.sysctls(&[
            ("net.ipv6.conf.all.accept_dad", "0"),
            ("net.ipv6.conf.default.accept_dad", "0"),
            ("net.ipv6.conf.default.dad_transmits", "0"),
            ("net.ipv6.conf.default.accept_ra", "0"),
            ("net.ipv4.icmp_ratemask", "0"),
            ("net.ipv6.icmp.ratemask", "\n"),
        ]);
        namespace.ip("link set lo up");
        namespace
    }

    /// The name, made unique with the process id.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A path that names the namespace for other programs while this process lives:
    /// `nsenter --net=PATH`, `ip link set dev eth0 netns PATH`.
    pub fn path(&self) -> PathBuf {
        let (process, descriptor) = (std::process::id(), self.file.as_raw_fd());
        format!("/proc/{process}/fd/{descriptor}").into()
    }

    /// Moves the calling thread into the namespace for the rest of its life.
    #[track_caller]
    pub fn enter(&self) {
        setns(&*self.file, CloneFlags::CLONE_NEWNET)
            .unwrap_or_else(|error| panic!("cannot enter the namespace {}: {error}", self.name));
    }

    /// Runs a closure on a thread inside the namespace and returns its value.
    ///
    /// Sockets opened there stay in the namespace wherever they are used afterwards. A panic
    /// of the closure continues in the caller.
    pub fn run<T: Send>(&self, closure: impl FnOnce() -> T + Send) -> T {
        let result = thread::scope(|scope| {
            thread::Builder::new()
                .name(self.name.to_string())
                .spawn_scoped(scope, || {
                    self.enter();
                    closure()
                })
                .expect("a thread can be started")
                .join()
        });
        result.unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// A command that runs inside the namespace; its process id is the program's own.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        let mut net = std::ffi::OsString::from("--net=");
        net.push(self.path());
        command.arg(net).arg("--").arg(program);
        // `nft` and `ip` live in directories that a user's PATH need not have.
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{path}:/usr/local/sbin:/usr/sbin:/sbin"));
        command
    }

    /// Runs `ip` with the words of one line, for example `route add default via 10.0.0.1`.
    #[track_caller]
    pub fn ip(&self, line: &str) {
        self.ip_batch([line]);
    }

    /// Runs several `ip` lines in one process.
    #[track_caller]
    pub fn ip_batch<L: AsRef<str>>(&self, lines: impl IntoIterator<Item = L>) {
        let mut batch = String::new();
        for line in lines {
            batch.push_str(line.as_ref());
            batch.push('\n');
        }
        self.feed("ip", &["-batch", "-"], &batch);
    }

    /// Loads a ruleset given as text with `nft -f`.
    #[track_caller]
    pub fn nft_load(&self, ruleset: &str) {
        self.feed("nft", &["-f", "-"], ruleset);
    }

    /// What `nft` prints for these arguments; an error of `nft` panics.
    #[track_caller]
    pub fn nft(&self, arguments: &[&str]) -> String {
        self.feed("nft", arguments, "")
    }

    /// Runs a program with this standard input and returns its output; panics if it fails.
    #[track_caller]
    pub fn feed(&self, program: &str, arguments: &[&str], input: &str) -> String {
        let mut child = self
            .command(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start nsenter for {program}: {error}"));
        let mut stdin = child.stdin.take().expect("standard input is piped");
        // Written beside the reading of the output, or both sides could wait for the other.
        let output: Output = thread::scope(|scope| {
            scope.spawn(move || stdin.write_all(input.as_bytes()));
            child.wait_with_output()
        })
        .unwrap_or_else(|error| panic!("cannot wait for {program}: {error}"));
        assert!(
            output.status.success(),
            "{program} {} in {} fails ({}): {}\n{input}",
            arguments.join(" "),
            self.name,
            output.status,
            String::from_utf8_lossy(&output.stderr),
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Adds an address, as `10.0.0.1/24` or `fd00::1/64`, usable at once.
    #[track_caller]
    pub fn addr_add(&self, device: &str, address: &str) {
        self.ip(&addr_line(device, address));
    }

    /// Adds a route: `route_add("10.96.0.0/16", "via 192.168.10.1")`.
    #[track_caller]
    pub fn route_add(&self, destination: &str, rest: &str) {
        self.ip(&route_line(destination, rest));
    }

    /// Sets a kernel setting of the namespace: `sysctl("net.ipv4.ip_forward", "1")`.
    #[track_caller]
    pub fn sysctl(&self, key: &str, value: &str) {
        self.sysctls(&[(key, value)]);
    }

    /// Sets several kernel settings of the namespace.
    #[track_caller]
    pub fn sysctls(&self, settings: &[(&str, &str)]) {
        self.run(|| {
            for (key, value) in settings {
                let path = format!("/proc/sys/{}", key.replace('.', "/"));
                std::fs::write(&path, value)
                    .unwrap_or_else(|error| panic!("cannot write {value} to {path}: {error}"));
            }
        });
    }

    /// How many TCP connection requests from here had to be sent again, because no answer came
    /// within a second.
    #[track_caller]
    pub fn repeated_requests(&self) -> u64 {
        let table = self.run(|| std::fs::read_to_string("/proc/thread-self/net/netstat"));
        let table = table.expect("the kernel's counters");
        let mut lines = table.lines().filter(|line| line.starts_with("TcpExt:"));
        let (names, values) = lines.next().zip(lines.next()).expect("names and values");
        let mut pairs = names.split_whitespace().zip(values.split_whitespace());
        let found = pairs.find(|(name, _)| *name == "TCPSynRetrans");
        let (_, value) = found.expect("the kernel counts repeated requests");
        value.parse().expect("a number")
    }

    /// Joins two namespaces with a pair of linked devices and brings both up.
    #[track_caller]
    pub fn veth(&self, device: &str, peer: &Namespace, peer_device: &str) {
        let path = peer.path();
        self.ip_batch([
            format!(
                "link add {device} type veth peer name {peer_device} netns {}",
                path.display()
            ),
            format!("link set {device} up"),
        ]);
        peer.ip(&format!("link set {peer_device} up"));
    }
}

/// The `ip` line that adds an address, for [`Namespace::ip_batch`].
fn addr_line(device: &str, address: &str) -> String {
    // IPv6 addresses would otherwise be tentative, and unusable, for a second.
    let nodad = if address.contains(':') { " nodad" } else { "" };
    format!("addr add {address} dev {device}{nodad}")
}

/// The `ip` line that adds a route, for [`Namespace::ip_batch`].
fn route_line(destination: &str, rest: &str) -> String {
    // `default` alone does not give `ip` the family.
    let destination = match destination {
        "default" if rest.contains(':') => "::/0",
        other => other,
    };
    format!("route add {destination} {rest}")
}

/// The prefix length that means one address.
fn host_prefix(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// Runs a test that returns how many connection requests were lost, and panics if some were each of
/// three times. Where the machine stalls for a second, the kernel also repeats requests that only
/// have to wait; those that rules lose are lost every time.
#[track_caller]
pub fn loses_nothing(mut test: impl FnMut() -> u64) {
    let mut lost = Vec::new();
    while lost.last() != Some(&0) {
        assert!(lost.len() < 3, "connection requests were lost: {lost:?}");
        lost.push(test());
        eprintln!("connection requests lost in each run so far: {lost:?}");
    }
}

/// Waits until the closure gives a value, which is returned, and panics after the bound.
///
/// The bound should be [`PATIENCE`], or as generous: it is reached only by a failing test.
#[track_caller]
pub fn wait_for<T>(what: &str, within: Duration, mut probe: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + within;
    loop {
        if let Some(value) = probe() {
            return value;
        }
        assert!(
            Instant::now() < deadline,
            "waited {within:?} in vain for {what}"
        );
        thread::sleep(Duration::from_millis(5));
    }
}
