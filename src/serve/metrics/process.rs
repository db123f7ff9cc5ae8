//! The standard metrics `process_*` of Prometheus client libraries.
//!
//! Read from `/proc` here: the `process` feature of the prometheus crate would bring the procfs
//! crate and with it a second rustix, for six numbers of two files.

use std::fs;
use std::sync::Mutex;

use prometheus::{Counter, Error, Gauge, IntGauge, Registry};
use rustix::process::{Resource, getrlimit};

use crate::mutex::lock;

/// The metrics `process_*`.
#[derive(Debug)]
pub(super) struct ProcessMetrics {
    cpu: Mutex<Counter>,
    resident: IntGauge,
    mapped: IntGauge,
    open_files: IntGauge,
    max_files: IntGauge,
    threads: IntGauge,
}

impl ProcessMetrics {
    pub(super) fn register(registry: &Registry) -> Result<Self, Error> {
        let gauge = |name: &str, help: &str| -> Result<IntGauge, Error> {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let cpu = Counter::new(
            "process_cpu_seconds_total",
            "Total user and system CPU time spent in seconds",
        )?;
        registry.register(Box::new(cpu.clone()))?;
        let start = Gauge::new(
            "process_start_time_seconds",
            "Start time of the process since unix epoch in seconds",
        )?;
        if let Some(seconds) = start_time() {
            start.set(seconds);
            registry.register(Box::new(start))?;
        }
        Ok(Self {
            cpu: Mutex::new(cpu),
            resident: gauge(
                "process_resident_memory_bytes",
                "Resident memory size in bytes",
            )?,
            mapped: gauge(
                "process_virtual_memory_bytes",
                "Virtual memory size in bytes",
            )?,
            open_files: gauge("process_open_fds", "Number of open file descriptors")?,
            max_files: gauge(
                "process_max_fds",
                "Maximum number of open file descriptors, -1 if unlimited",
            )?,
            threads: gauge("process_threads", "Number of OS threads in the process")?,
        })
    }

    /// Reads the current values. A metric that cannot be read keeps its last value.
    pub(super) fn refresh(&self) {
        if let Some(stat) = Stat::read() {
            // The lock keeps concurrent scrapes from adding the same time twice.
            let cpu = lock(&self.cpu);
            cpu.inc_by((stat.cpu_seconds() - cpu.get()).max(0.0));
            self.resident.set(stat.resident_bytes());
            self.mapped.set(stat.mapped_bytes);
            self.threads.set(stat.threads);
        }
        if let Ok(entries) = fs::read_dir("/proc/self/fd") {
            // One descriptor is the open directory itself.
            let open = entries.count().saturating_sub(1);
            self.open_files.set(i64::try_from(open).unwrap_or(i64::MAX));
        }
        let limit = getrlimit(Resource::Nofile).current;
        self.max_files
            .set(limit.map_or(-1, |limit| i64::try_from(limit).unwrap_or(i64::MAX)));
    }
}

/// The fields of `/proc/self/stat` in use.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    cpu_ticks: u64,
    threads: i64,
    start_ticks: u64,
    mapped_bytes: i64,
    resident_pages: i64,
}

impl Stat {
    fn read() -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/self/stat").ok()?)
    }

    /// Parses the line, whose fields proc_pid_stat(5) numbers from 1.
    fn parse(line: &str) -> Option<Self> {
        // The second field is the program's name in parentheses, which may hold spaces and
        // parentheses itself; the third follows the last of them.
        let (_, rest) = line.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number - 3).copied();
        let user: u64 = field(14)?.parse().ok()?;
        let system: u64 = field(15)?.parse().ok()?;
        Some(Self {
            cpu_ticks: user.saturating_add(system),
            threads: field(20)?.parse().ok()?,
            start_ticks: field(22)?.parse().ok()?,
            mapped_bytes: field(23)?.parse().ok()?,
            resident_pages: field(24)?.parse().ok()?,
        })
    }

    fn cpu_seconds(&self) -> f64 {
        seconds(self.cpu_ticks)
    }

    fn resident_bytes(&self) -> i64 {
        let page = i64::try_from(rustix::param::page_size()).unwrap_or(i64::MAX);
        self.resident_pages.saturating_mul(page)
    }
}

/// When the process started, in seconds since the epoch.
fn start_time() -> Option<f64> {
    let started = seconds(Stat::read()?.start_ticks);
    let system = fs::read_to_string("/proc/stat").ok()?;
    let mut lines = system.lines();
    let boot: u32 = lines
        .find_map(|line| line.strip_prefix("btime "))?
        .trim()
        .parse()
        .ok()?;
    Some(f64::from(boot) + started)
}

/// Clock ticks in seconds.
fn seconds(ticks: u64) -> f64 {
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_name_with_parentheses_does_not_shift_the_fields() {
        let line = "42 (a) b (c) S 1 42 42 0 -1 4194560 100 0 0 0 7 5 0 0 20 0 3 0 1234 8192000 \
                    250 18446744073709551615 0 0 0 0\n";
        assert_eq!(
            Stat::parse(line),
            Some(Stat {
                cpu_ticks: 12,
                threads: 3,
                start_ticks: 1234,
                mapped_bytes: 8_192_000,
                resident_pages: 250,
            })
        );
    }

    #[test]
    fn a_line_cut_short_has_no_values() {
        assert_eq!(Stat::parse(""), None);
        assert_eq!(Stat::parse("42 (a) S 1 2"), None);
        assert_eq!(Stat::parse("42 (a"), None);
    }
}
