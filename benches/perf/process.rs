//! The process that is measured, seen from outside: its log, its metrics, and what the kernel
//! reports of it.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, SysconfVar, sysconf};

use nftlet_lab::netns::Namespace;

/// What nftlet writes when its first rules are in force.
const IN_PLACE: &str = "the rules are in place";
/// The port of the metrics, kube-proxy's.
const METRICS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 10249);
/// Far beyond every budget.
const PATIENCE: Duration = Duration::from_secs(300);
/// From one look at the metrics to the next.
const LOOK: Duration = Duration::from_millis(50);

/// The results of audits.
pub const AUDITS: &str = "nftlet_audits_total";
/// More elements than notifications about them fit into the queue of a process.
const OVERFLOW: u32 = 20_000;

/// A running nftlet; killed when it is dropped.
pub struct Process {
    namespace: Namespace,
    child: Child,
    started: Instant,
    lines: Receiver<(Instant, String)>,
    log: Vec<String>,
}

/// What a process has in memory, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// Now.
    pub resident: u64,
    /// The most it ever had.
    pub peak: u64,
}

impl Process {
    /// Starts nftlet in a namespace.
    pub fn start(namespace: &Namespace, program: &Path, arguments: &[String]) -> Self {
        let started = Instant::now();
        let mut child = namespace
            .command("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .args(arguments)
            .env_remove("KUBECONFIG")
            .env_remove("KUBERNETES_SERVICE_HOST")
            .env_remove("NODE_NAME")
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("nsenter can be started");
        let stderr = child.stderr.take().expect("standard error is piped");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                // Fails when lines are no longer waited for.
                let _ = sender.send((Instant::now(), line));
            }
        });
        Self {
            namespace: namespace.clone(),
            child,
            started,
            lines,
            log: Vec::new(),
        }
    }

    /// Waits until the first rules are in force; returns the time since the start of the process.
    pub fn until_in_place(&mut self) -> Duration {
        let deadline = self.started + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok((at, line)) => {
                    let found = line.contains(IN_PLACE);
                    self.log.push(line);
                    if found {
                        return at.duration_since(self.started);
                    }
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => panic!(
                    "nftlet did not put its rules in place:\n{}",
                    self.log.join("\n")
                ),
            }
        }
    }

    /// What the process uses of memory.
    pub fn memory(&self) -> Memory {
        let status = self.proc("status");
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let kibibytes =
                line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
            kibibytes.expect("the kernel counts memory in kB") * 1024
        };
        Memory {
            resident: field("VmRSS:"),
            peak: field("VmHWM:"),
        }
    }

    /// The processor time of the process so far, of all its threads, in the kernel and outside. It
    /// is counted in ticks.
    pub fn ticks(&self) -> u64 {
        let stat = self.proc("stat");
        // The name in parentheses may contain spaces; `utime` and `stime` are the fields 14, 15.
        let (_, fields) = stat.rsplit_once(')').expect("a name in parentheses");
        let fields = fields.split_whitespace().skip(11).take(2);
        fields
            .map(|ticks| ticks.parse::<u64>().expect("a number of ticks"))
            .sum()
    }

    fn proc(&self, file: &str) -> String {
        let path = format!("/proc/{}/{file}", self.child.id());
        std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("cannot read {path}: {error}"))
    }

    /// Its metrics as they are now.
    pub fn metrics(&self) -> Metrics {
        let mut stream = self
            .namespace
            .run(|| TcpStream::connect(METRICS))
            .unwrap_or_else(|error| panic!("no connection to nftlet's metrics: {error}"));
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let request = b"GET /metrics HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n";
        stream.write_all(request).expect("a request is sent");
        let mut page = String::new();
        stream.read_to_string(&mut page).expect("a page of text");
        Metrics(page)
    }

    /// Has the process miss notifications about another table, and waits for the audit that follows.
    /// Returns how long it took.
    pub fn audit(&self) -> Duration {
        let audits = || -> f64 {
            let results = self.metrics().labelled(AUDITS);
            results.iter().map(|(_, count)| count).sum()
        };
        let before = audits();
        let signal = |signal| {
            let pid = Pid::from_raw(self.child.id().cast_signed());
            kill(pid, signal).expect("the process is there");
        };
        signal(Signal::SIGSTOP);
        let elements: Vec<String> = (0..OVERFLOW).map(|number| number.to_string()).collect();
        self.namespace.nft_load(&format!(
            "table ip overflow {{ set s {{ type mark; elements = {{ {} }}; }}; }}",
            elements.join(", ")
        ));
        self.namespace.nft_load("delete table ip overflow");
        let started = Instant::now();
        signal(Signal::SIGCONT);
        while audits() == before {
            assert!(started.elapsed() < PATIENCE, "there is no audit");
            std::thread::sleep(LOOK);
        }
        started.elapsed()
    }

    /// Ends the process as the kubelet does.
    pub fn stop(mut self) {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        kill(pid, Signal::SIGTERM).expect("the process is there");
        let status = self.child.wait().expect("it is a child");
        assert!(
            status.success(),
            "nftlet ends with {status}:\n{}",
            self.rest().join("\n")
        );
    }

    fn rest(&mut self) -> &[String] {
        self.log.extend(self.lines.iter().map(|(_, line)| line));
        &self.log
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails only where the process has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How many seconds a tick is.
pub fn tick() -> f64 {
    let per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten();
    1.0 / per_second.expect("the kernel has ticks") as f64
}

/// A page of metrics.
pub struct Metrics(String);

impl Metrics {
    /// A metric by its name with the labels as they are written.
    pub fn get(&self, name: &str) -> f64 {
        let value = self.0.lines().find_map(|line| {
            let value = line.strip_prefix(name)?.strip_prefix(' ')?;
            value.trim().parse().ok()
        });
        value.unwrap_or_else(|| panic!("nftlet has no metric {name}:\n{}", self.0))
    }

    /// The sum of what a histogram has seen, in seconds, and how often it saw something.
    pub fn histogram(&self, name: &str, labels: &str) -> (f64, u64) {
        let sum = self.get(&format!("{name}_sum{labels}"));
        (sum, self.get(&format!("{name}_count{labels}")) as u64)
    }

    /// The buckets of a histogram without labels: their upper bounds in seconds, and how often
    /// something up to there was seen.
    pub fn buckets(&self, name: &str) -> Vec<(f64, u64)> {
        let start = format!("{name}_bucket{{le=\"");
        let bucket = |line: &str| {
            let (bound, count) = line.strip_prefix(&start)?.split_once("\"} ")?;
            Some((bound.parse().ok()?, count.trim().parse().ok()?))
        };
        self.0.lines().filter_map(bucket).collect()
    }

    /// Every metric with this name, with its labels as they are written.
    pub fn labelled(&self, name: &str) -> Vec<(String, f64)> {
        let labelled = |line: &str| {
            let (labels, value) = line.strip_prefix(name)?.rsplit_once(' ')?;
            let labels = labels.strip_prefix('{')?.strip_suffix('}')?;
            Some((labels.to_owned(), value.parse().ok()?))
        };
        self.0.lines().filter_map(labelled).collect()
    }
}
