//! Kernel parameters that kube-proxy sets: those of connection tracking, and the OOM score of the
//! process.
//!
//! [`ConntrackParameters::wanted`] returns the values for a machine, and [`apply`] writes the ones
//! that differ. It returns parameters that cannot be written, and goes on: in a container
//! `/proc/sys` is often read-only, and services work without them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use thiserror::Error;

/// kube-proxy's upper limit of `nf_conntrack_max` for any number of cores.
const MOST_CONNECTIONS: u64 = 1_048_576;
const MAX: &str = "proc/sys/net/netfilter/nf_conntrack_max";
const ONLINE: &str = "sys/devices/system/cpu/online";
/// More cores than any kernel supports.
const MOST_CORES: u64 = 1 << 16;
const OOM_SCORE: &str = "proc/self/oom_score_adj";
const HASH_SIZE: &str = "sys/module/nf_conntrack/parameters/hashsize";

/// Parameters of connection tracking. Zero or `false` leaves the kernel's value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ConntrackParameters {
    /// Connections per core (`maxPerCore`).
    pub(crate) max_per_core: u32,
    /// The lowest number of connections (`min`), unless `max_per_core` is 0.
    pub(crate) min: u32,
    /// `tcpEstablishedTimeout`.
    pub(crate) tcp_established: Duration,
    /// `tcpCloseWaitTimeout`.
    pub(crate) tcp_close_wait: Duration,
    /// `tcpBeLiberal`.
    pub(crate) tcp_be_liberal: bool,
    /// `udpTimeout`.
    pub(crate) udp: Duration,
    /// `udpStreamTimeout`.
    pub(crate) udp_stream: Duration,
}

/// A kernel parameter that could not be set.
#[derive(Debug, Error)]
#[error("cannot set /{} to {value}: {source}; set it on the host or with a privileged nftlet --init-only, or leave it with 0", path.display())]
pub(crate) struct Unset {
    /// The file, relative to the root.
    pub(crate) path: PathBuf,
    value: u64,
    source: io::Error,
}

impl Unset {
    /// Returns whether the kernel does not have the parameter, or not yet.
    pub(crate) fn is_missing(&self) -> bool {
        self.source.kind() == io::ErrorKind::NotFound
    }
}

/// Returns the number of cores of the machine, read below a root directory (`/`). A container may
/// use fewer.
pub(crate) fn cores(root: &Path) -> u64 {
    let online = fs::read_to_string(root.join(ONLINE)).ok();
    let online = online.and_then(|ranges| count(&ranges));
    online.unwrap_or_else(|| {
        thread::available_parallelism().map_or(1, |cores| cores.get().try_into().unwrap_or(1))
    })
}

/// Counts the numbers in ranges such as `0-3,6`.
fn count(ranges: &str) -> Option<u64> {
    let ranges = ranges.trim().split(',').map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
        last.checked_sub(first)?.checked_add(1)
    });
    ranges
        .sum::<Option<u64>>()
        .filter(|cores| (1..=MOST_CORES).contains(cores))
}

/// Sets the OOM score adjustment of this process, below a root directory (`/`). Writes nothing if
/// the process has it already. Lowering it takes CAP_SYS_RESOURCE.
pub(crate) fn set_oom_score(root: &Path, score: i16) -> Result<(), OomScoreError> {
    let path = root.join(OOM_SCORE);
    let current = fs::read_to_string(&path).ok();
    let current = current.and_then(|text| text.trim().parse::<i16>().ok());
    if current == Some(score) {
        return Ok(());
    }
    fs::write(&path, score.to_string()).map_err(|source| OomScoreError { score, source })
}

/// The OOM score adjustment could not be set.
#[derive(Debug, Error)]
#[error(
    "cannot set /{OOM_SCORE} to {score}: {source}; grant CAP_SYS_RESOURCE, or request a value that is not below the present one with --oom-score-adj or oomScoreAdj"
)]
pub(crate) struct OomScoreError {
    score: i16,
    source: io::Error,
}

impl ConntrackParameters {
    /// Returns the files and their values for a machine with a number of cores.
    pub(crate) fn wanted(&self, cores: u64) -> Vec<(&'static str, u64)> {
        let seconds = |duration: Duration| duration.as_secs();
        let timeouts = [
            (
                "proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established",
                seconds(self.tcp_established),
            ),
            (
                "proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait",
                seconds(self.tcp_close_wait),
            ),
            (
                "proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal",
                u64::from(self.tcp_be_liberal),
            ),
            (
                "proc/sys/net/netfilter/nf_conntrack_udp_timeout",
                seconds(self.udp),
            ),
            (
                "proc/sys/net/netfilter/nf_conntrack_udp_timeout_stream",
                seconds(self.udp_stream),
            ),
        ];
        let max = self.max(cores);
        [(MAX, max), (HASH_SIZE, max / 4)]
            .into_iter()
            .chain(timeouts)
            .filter(|(_, value)| *value > 0)
            .collect()
    }

    fn max(&self, cores: u64) -> u64 {
        if self.max_per_core == 0 {
            return 0;
        }
        let scaled = u64::from(self.max_per_core) * cores;
        scaled.min(MOST_CONNECTIONS).max(self.min.into())
    }
}

/// Writes the values that differ, below a root directory (`/`), and returns the ones that could not
/// be written. A larger hash table is not changed.
pub(crate) fn apply(root: &Path, wanted: &[(&'static str, u64)]) -> Vec<Unset> {
    let mut unset = Vec::new();
    for (file, value) in wanted {
        let path = root.join(file);
        let current = fs::read_to_string(&path);
        let current = current
            .ok()
            .and_then(|text| text.trim().parse::<u64>().ok());
        let enough = current
            .is_some_and(|current| current == *value || (*file == HASH_SIZE && current > *value));
        if enough {
            continue;
        }
        if let Err(source) = fs::write(&path, value.to_string()) {
            unset.push(Unset {
                path: PathBuf::from(file),
                value: *value,
                source,
            });
        }
    }
    unset
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFAULT: ConntrackParameters = ConntrackParameters {
        max_per_core: 32_768,
        min: 131_072,
        tcp_established: Duration::from_secs(86_400),
        tcp_close_wait: Duration::from_secs(3_600),
        tcp_be_liberal: false,
        udp: Duration::ZERO,
        udp_stream: Duration::ZERO,
    };

    fn value(wanted: &[(&str, u64)], name: &str) -> Option<u64> {
        let mut found = wanted.iter().filter(|(file, _)| file.ends_with(name));
        found.next().map(|(_, value)| *value)
    }

    #[test]
    fn the_table_grows_with_the_cores_between_two_limits() {
        let max = |cores| value(&DEFAULT.wanted(cores), "nf_conntrack_max");
        assert_eq!(max(1), Some(131_072));
        assert_eq!(max(8), Some(262_144));
        assert_eq!(max(256), Some(1_048_576));
        assert_eq!(value(&DEFAULT.wanted(8), "hashsize"), Some(65_536));
        let none = ConntrackParameters {
            max_per_core: 0,
            ..DEFAULT
        };
        assert_eq!(value(&none.wanted(8), "nf_conntrack_max"), None);
        assert_eq!(value(&none.wanted(8), "hashsize"), None);
    }

    #[test]
    fn the_score_is_written_where_it_differs() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join(OOM_SCORE);
        let error = set_oom_score(root.path(), -999).unwrap_err().to_string();
        assert!(
            error.starts_with("cannot set /proc/self/oom_score_adj to -999: "),
            "{error}"
        );
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, "-999\n").unwrap();
        set_oom_score(root.path(), -999).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "-999\n", "not written");
        set_oom_score(root.path(), 5).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "5");
    }

    #[test]
    fn zero_asks_for_nothing() {
        assert!(ConntrackParameters::default().wanted(8).is_empty());
        let wanted = DEFAULT.wanted(8);
        assert_eq!(value(&wanted, "tcp_timeout_established"), Some(86_400));
        assert_eq!(value(&wanted, "tcp_timeout_close_wait"), Some(3_600));
        assert_eq!(value(&wanted, "udp_timeout"), None);
        assert_eq!(value(&wanted, "tcp_be_liberal"), None);
    }

    #[test]
    fn values_that_differ_are_written_and_failures_are_returned() {
        let root = tempfile::tempdir().unwrap();
        let [present, larger, absent] = [
            "proc/sys/net/netfilter/nf_conntrack_udp_timeout",
            HASH_SIZE,
            "proc/nowhere/value",
        ];
        for (file, text) in [(present, "30\n"), (larger, "99\n")] {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let unset = apply(root.path(), &[(present, 60), (larger, 50), (absent, 1)]);
        let read = |file: &str| fs::read_to_string(root.path().join(file)).unwrap();
        assert_eq!(read(present), "60");
        assert_eq!(read(larger), "99\n", "a larger hash table is left alone");
        assert_eq!(unset.len(), 1);
        assert!(
            unset[0]
                .to_string()
                .starts_with("cannot set /proc/nowhere/value to 1: "),
            "{}",
            unset[0]
        );
        // An equal value is not written: the file may be read-only.
        fs::write(root.path().join(present), "60\n").unwrap();
        assert!(apply(root.path(), &[(present, 60)]).is_empty());
        assert_eq!(read(present), "60\n");
    }

    #[test]
    fn the_cores_are_those_of_the_machine() {
        for (ranges, wanted) in [
            ("0\n", Some(1)),
            ("0-3\n", Some(4)),
            ("0-1,4,6-7", Some(5)),
            ("", None),
            ("3-0", None),
            ("0-18446744073709551615", None),
            ("0-9999999999", None),
            ("a", None),
        ] {
            assert_eq!(count(ranges), wanted, "{ranges:?}");
        }
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join(ONLINE);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, "0-99\n").unwrap();
        assert_eq!(cores(root.path()), 100);
        fs::write(&file, "?").unwrap();
        assert!(cores(root.path()) >= 1);
    }
}
