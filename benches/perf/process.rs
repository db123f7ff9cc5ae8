//! The process that is measured, seen from outside: its log, its metrics, and what the kernel
//! reports of it.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::{SysconfVar, sysconf};

use nftlet_lab::netns::{Daemon, Namespace};

/// What nftlet writes when its first rules are in force.
const IN_PLACE: &str = "the rules are in place";
/// The port of the metrics, kube-proxy's.
const METRICS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 10249);
/// Far beyond every budget.
pub const PATIENCE: Duration = Duration::from_secs(300);
/// From one look at the metrics to the next.
const LOOK: Duration = Duration::from_millis(50);
/// The results of audits.
pub const AUDITS: &str = "nftlet_audits_total";
/// More elements than notifications about them fit into the queue of a process.
const OVERFLOW: u32 = 20_000;

/// A running nftlet or kube-proxy; killed when it is dropped.
pub struct Process {
    namespace: Namespace,
    daemon: Daemon,
    started: Instant,
    lines: Receiver<(Instant, String)>,
    log: Vec<String>,
}

/// What a process has in memory, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    pub resident: f64,
    /// The most it ever had.
    pub peak: f64,
}

impl Process {
    /// Starts a program in a namespace.
    pub fn start(namespace: &Namespace, program: &Path, arguments: &[String]) -> Self {
        let (log, stderr) = std::io::pipe().expect("a pipe");
        let started = Instant::now();
        let mut words: Vec<&str> = Vec::new();
        for variable in [
            "KUBECONFIG",
            "KUBERNETES_SERVICE_HOST",
            "NODE_NAME",
            "RUST_LOG",
        ] {
            words.extend(["-u", variable]);
        }
        words.push(program.to_str().expect("a path of UTF-8"));
        words.extend(arguments.iter().map(String::as_str));
        let daemon = Daemon::start_with_stderr(namespace, "env", words, stderr);
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(log).lines().map_while(Result::ok) {
                // Fails when lines are no longer waited for.
                let _ = sender.send((Instant::now(), line));
            }
        });
        Self {
            namespace: namespace.clone(),
            daemon,
            started,
            lines,
            log: Vec::new(),
        }
    }

    /// The time at which it was started.
    pub fn started(&self) -> Instant {
        self.started
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
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    panic!("nftlet did not put its rules in place:\n{}", self.rest())
                }
            }
        }
    }

    /// What the process uses of memory.
    pub fn memory(&self) -> Memory {
        let status = self.proc("status");
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let kibibytes =
                line.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
            1024.0 * kibibytes.unwrap_or_else(|| panic!("no {name} in kB:\n{status}"))
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

    /// The seconds of processor time that the main thread used.
    pub fn main_thread(&self) -> f64 {
        let stat = self.proc(&format!("task/{}/schedstat", self.daemon.pid()));
        let nanoseconds = stat.split_whitespace().next();
        let nanoseconds = nanoseconds.and_then(|it| it.parse::<f64>().ok());
        nanoseconds.expect("a number of nanoseconds") / 1e9
    }

    fn proc(&self, file: &str) -> String {
        let path = format!("/proc/{}/{file}", self.daemon.pid());
        std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("cannot read {path}: {error}"))
    }

    /// Its metrics as they are now.
    pub fn metrics(&self) -> Metrics {
        let page = self.try_metrics();
        page.unwrap_or_else(|error| panic!("no metrics: {error}"))
    }

    /// As [`Process::metrics`], where the port may not be open yet.
    pub fn try_metrics(&self) -> std::io::Result<Metrics> {
        let mut stream = self.namespace.run(|| TcpStream::connect(METRICS))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET /metrics HTTP/1.0\r\nHost: node\r\n\r\n")?;
        let mut page = String::new();
        stream.read_to_string(&mut page)?;
        Ok(Metrics(page))
    }

    /// Has the process miss notifications about another table, and waits for the audit that follows.
    /// Returns how long it took.
    pub fn audit(&self) -> Duration {
        let audits = || -> f64 {
            let results = self.metrics().labelled(AUDITS);
            results.iter().map(|(_, count)| count).sum()
        };
        let before = audits();
        self.daemon.signal(Signal::SIGSTOP);
        let elements: Vec<String> = (0..OVERFLOW).map(|number| number.to_string()).collect();
        self.namespace.nft_load(&format!(
            "table ip overflow {{ set s {{ type mark; elements = {{ {} }}; }}; }}",
            elements.join(", ")
        ));
        self.namespace.nft_load("delete table ip overflow");
        let started = Instant::now();
        self.daemon.signal(Signal::SIGCONT);
        while audits() == before {
            assert!(started.elapsed() < PATIENCE, "there is no audit");
            std::thread::sleep(LOOK);
        }
        started.elapsed()
    }

    /// Ends the process as the kubelet does.
    pub fn stop(mut self) {
        let status = self.daemon.stop(PATIENCE);
        assert!(
            status.is_some_and(|status| status.success()),
            "the process ends with {status:?}:\n{}",
            self.rest()
        );
    }

    /// The log so far.
    fn rest(&mut self) -> String {
        self.log.extend(self.lines.try_iter().map(|(_, line)| line));
        self.log.join("\n")
    }
}

/// How many seconds a number of ticks is.
pub fn seconds(ticks: u64) -> f64 {
    let per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten();
    ticks as f64 / per_second.expect("the kernel has ticks") as f64
}

/// A page of metrics.
pub struct Metrics(String);

impl Metrics {
    /// A metric by its name with the labels as they are written.
    pub fn get(&self, name: &str) -> f64 {
        let value = self.find(name);
        value.unwrap_or_else(|| panic!("there is no metric {name}:\n{}", self.0))
    }

    fn find(&self, name: &str) -> Option<f64> {
        self.0.lines().find_map(|line| {
            let value = line.strip_prefix(name)?.strip_prefix(' ')?;
            value.trim().parse().ok()
        })
    }

    /// The sum of what a histogram has seen, in seconds, and how often it saw something; zeros if
    /// there is no such histogram yet.
    pub fn histogram(&self, name: &str, labels: &str) -> (f64, u64) {
        let part = |part| {
            self.find(&format!("{name}_{part}{labels}"))
                .unwrap_or_default()
        };
        (part("sum"), part("count") as u64)
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
