//! kube-proxy's chains in iptables, read and removed with iptables' own programs.
//!
//! There are two kinds of iptables, which see nothing of each other: the legacy one with tables of
//! its own in the kernel, and the one on top of nftables. A host can have rules in both, and in
//! both families. For each of these four there is a cheap look first, which needs no program:
//!
//! ```text
//! nft:     chains of the tables `ip nat`, ... over netlink ──┐
//! legacy:  /proc/net/ip_tables_names                         ├─ something ──> save, compare, restore
//!                                                            └─ nothing ────> done
//! ```
//!
//! So a host without iptables needs no programs, and no table comes into being because somebody
//! looked for it. Each table is changed in one step, under the lock that all of iptables shares.

use std::env;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io::{self, Read, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::error::Error;
use super::owned::{self, IPTABLES_TABLES};
use super::report::Report;
use super::saved::{self, Removal};
use crate::netlink::Nftables;
use crate::nft::{Family, TableId};

/// Where programs of an administrator are, whatever the variable PATH says.
const SBIN: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];
/// How long to wait for others who change iptables, in seconds.
const WAIT: &str = "--wait=30";
/// How long a program may take in all.
const PATIENCE: Duration = Duration::from_secs(60);
/// The longest pause between two looks whether a program has ended.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How often a table is read again because others changed it meanwhile.
const ATTEMPTS: usize = 3;

/// Which iptables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// With tables of its own in the kernel.
    Legacy,
    /// On top of nftables.
    Nft,
}

/// One of the four iptables of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Iptables {
    /// Which kind.
    pub variant: Variant,
    /// Of which family.
    pub family: Family,
}

impl Iptables {
    /// All four.
    pub const ALL: [Self; 4] = [
        Self::new(Variant::Nft, Family::Ip),
        Self::new(Variant::Nft, Family::Ip6),
        Self::new(Variant::Legacy, Family::Ip),
        Self::new(Variant::Legacy, Family::Ip6),
    ];

    const fn new(variant: Variant, family: Family) -> Self {
        Self { variant, family }
    }

    /// `iptables` or `ip6tables`.
    fn family_name(self) -> &'static str {
        match self.family {
            Family::Ip => "iptables",
            Family::Ip6 => "ip6tables",
        }
    }

    /// The names a program of it may have: that of the kind alone, and the one that alternatives
    /// lead to either kind.
    fn names(self, action: &str) -> [String; 2] {
        [
            format!("{self}-{action}"),
            format!("{}-{action}", self.family_name()),
        ]
    }

    /// Removes kube-proxy's chains and the jumps to them.
    pub fn clean(self, nftables: &mut Nftables, report: &mut Report) {
        match self.look(nftables) {
            Ok(Look::Nothing) => {}
            Ok(found) => match Programs::find(self) {
                Some(programs) => {
                    let outcome = programs.clean(report);
                    // Failures are told, and a table of the legacy kind is printed whole.
                    if let (Variant::Nft, Some(kept)) = (self.variant, outcome) {
                        self.look_again(nftables, &kept, &programs.save, report);
                    }
                }
                None => self.cannot(found, report),
            },
            Err(error) => report.fail(error),
        }
    }

    /// Tells of chains that the programs do not show: those of a table that holds rules which only
    /// `nft` can write.
    fn look_again(self, nftables: &mut Nftables, kept: &[Kept], save: &Path, report: &mut Report) {
        for table in IPTABLES_TABLES {
            let id = TableId::new(self.family, table);
            let names = match nftables.chain_names(&id) {
                Ok(names) => names,
                Err(error) => {
                    report.fail(error);
                    continue;
                }
            };
            let is_kept = |name: &str| kept.iter().any(|(at, chain)| at == table && chain == name);
            let stays = |name: &&str| owned::is_chain(name) && !is_kept(name);
            let chains = names.iter().map(|name| name.as_str()).filter(stays).count();
            if chains > 0 {
                report.fail(Error::Hidden {
                    chains,
                    table: id,
                    program: save.to_owned(),
                });
            }
        }
    }

    /// Tells what stays for want of programs.
    fn cannot(self, found: Look, report: &mut Report) {
        let [program, _] = self.names("save");
        match found {
            Look::Nothing => {}
            Look::Chains(chains) => report.fail(Error::Programs {
                chains,
                iptables: self,
                program,
            }),
            Look::Tables(tables) => report.fail(Error::Unseen {
                tables: tables.join(", "),
                iptables: self,
                program,
            }),
        }
    }

    /// What can be seen without a program.
    fn look(self, nftables: &mut Nftables) -> Result<Look, Error> {
        match self.variant {
            Variant::Nft => {
                let mut chains = 0;
                for table in IPTABLES_TABLES {
                    let names = nftables.chain_names(&TableId::new(self.family, table))?;
                    chains += names.iter().filter(|n| owned::is_chain(n.as_str())).count();
                }
                Ok(if chains == 0 {
                    Look::Nothing
                } else {
                    Look::Chains(chains)
                })
            }
            Variant::Legacy => legacy_tables(self.family),
        }
    }
}

impl fmt::Display for Iptables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.variant {
            Variant::Legacy => "legacy",
            Variant::Nft => "nft",
        };
        write!(f, "{}-{kind}", self.family_name())
    }
}

/// What can be seen without a program.
#[derive(Debug, PartialEq, Eq)]
enum Look {
    /// There is nothing of kube-proxy's.
    Nothing,
    /// So many chains are kube-proxy's.
    Chains(usize),
    /// There are these tables, with who knows what in them.
    Tables(Vec<String>),
}

/// The tables of legacy iptables that exist. The kernel makes one when somebody first uses it.
fn legacy_tables(family: Family) -> Result<Look, Error> {
    let path = Path::new(match family {
        Family::Ip => "/proc/net/ip_tables_names",
        Family::Ip6 => "/proc/net/ip6_tables_names",
    });
    let names = match fs::read_to_string(path) {
        Ok(names) => names,
        // The kernel has no legacy iptables, or has not loaded it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Look::Nothing),
        Err(source) => {
            let path = path.to_owned();
            return Err(Error::Read { path, source });
        }
    };
    let mut tables: Vec<String> = names
        .lines()
        .filter(|name| IPTABLES_TABLES.contains(name))
        .map(str::to_owned)
        .collect();
    tables.sort();
    Ok(if tables.is_empty() {
        Look::Nothing
    } else {
        Look::Tables(tables)
    })
}

/// A chain that stays: its table and its name.
type Kept = (String, String);

/// The programs that print and change one of the four.
struct Programs {
    iptables: Iptables,
    save: PathBuf,
    restore: PathBuf,
}

impl Programs {
    /// Looks in the directories of PATH and those of administrators.
    fn find(iptables: Iptables) -> Option<Self> {
        let directories = directories(env::var_os("PATH"));
        let [own, common] = iptables.names("save");
        let [own_restore, common_restore] = iptables.names("restore");
        let pair = |save: &str, restore: &str| {
            Some(Self {
                iptables,
                save: program(&directories, save)?,
                restore: program(&directories, restore)?,
            })
        };
        pair(&own, &own_restore).or_else(|| {
            pair(&common, &common_restore)
                .filter(|programs| variant(&programs.save) == Some(iptables.variant))
        })
    }

    /// Removes kube-proxy's part from each table, one after the other. Returns the chains that stay
    /// because rules of others lead there, or nothing where something failed.
    fn clean(&self, report: &mut Report) -> Option<Vec<Kept>> {
        let mut left = ATTEMPTS;
        loop {
            left -= 1;
            let mut kept = Vec::new();
            let failed = match self.attempt(&mut kept, report) {
                Ok(failed) => failed,
                Err(error) => vec![error],
            };
            if failed.is_empty() {
                return Some(kept);
            }
            // Between reading and writing somebody else may have changed the table.
            if left == 0 || failed.iter().any(Error::is_timeout) {
                failed.into_iter().for_each(|error| report.fail(error));
                return None;
            }
        }
    }

    /// Reads all tables, and changes those that have something of kube-proxy's. Returns the
    /// tables that could not be changed.
    fn attempt(&self, kept: &mut Vec<Kept>, report: &mut Report) -> Result<Vec<Error>, Error> {
        let output = self.run(&self.save, &[], "")?;
        let saved = String::from_utf8_lossy(&output.stdout);
        let mut failed = Vec::new();
        for table in saved::parse(&saved) {
            if !IPTABLES_TABLES.contains(&table.name) {
                continue;
            }
            let removal = table.removal();
            let names = removal.kept.iter();
            kept.extend(names.map(|chain| (table.name.to_owned(), chain.clone())));
            if removal.input.is_empty() {
                self.tell(table.name, &removal, report);
                continue;
            }
            match self.run(&self.restore, &["--noflush", WAIT], &removal.input) {
                Ok(_) => self.tell(table.name, &removal, report),
                Err(error) => failed.push(error),
            }
        }
        Ok(failed)
    }

    fn tell(&self, table: &str, removal: &Removal, report: &mut Report) {
        let place = format!("{}, table {table}", self.iptables);
        if removal.chains > 0 {
            let jumps = match removal.jumps {
                0 => String::new(),
                jumps => format!(" and {}", counted(jumps, "jump")),
            };
            let chains = counted(removal.chains, "chain");
            report.removed(format!("{chains} of kube-proxy{jumps}"), place.clone());
        }
        if !removal.kept.is_empty() {
            report.note(format!(
                "{} in {place} stay, because rules of others ask for masquerading there",
                removal.kept.join(" and ")
            ));
        }
        if removal.forward_drops {
            report.note(format!(
                "the policy of FORWARD in {place} is DROP, and {} accepted the traffic of services \
                 until now; see that the network plugin accepts the traffic of pods",
                owned::FORWARD
            ));
        }
    }

    /// Runs a program to its end.
    fn run(&self, program: &Path, arguments: &[&str], input: &str) -> Result<Output, Error> {
        run(program, arguments, input)
    }
}

/// A number of things.
pub fn counted(number: usize, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {what}{plural}")
}

/// Runs a program with this input to its end; another status than 0 is an error, and so is a
/// program that does not end.
pub fn run(program: &Path, arguments: &[&str], input: &str) -> Result<Output, Error> {
    run_within(PATIENCE, program, arguments, input)
}

fn run_within(
    patience: Duration,
    program: &Path,
    arguments: &[&str],
    input: &str,
) -> Result<Output, Error> {
    let cannot = |source| Error::Run {
        program: program.to_owned(),
        source,
    };
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(cannot)?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let (ended, stdout, stderr) = thread::scope(|scope| {
        scope.spawn(move || {
            // A program that ends early says why itself.
            if let Some(mut stdin) = stdin {
                let _ = stdin.write_all(input.as_bytes());
            }
        });
        let stdout = scope.spawn(move || all_of(stdout));
        let stderr = scope.spawn(move || all_of(stderr));
        let ended = wait(&mut child, patience);
        (
            ended,
            stdout.join().unwrap_or_default(),
            stderr.join().unwrap_or_default(),
        )
    });
    let Some(status) = ended.map_err(cannot)? else {
        return Err(Error::Timeout {
            program: program.to_owned(),
            seconds: patience.as_secs(),
        });
    };
    if status.success() {
        return Ok(Output {
            status,
            stdout,
            stderr,
        });
    }
    let said = String::from_utf8_lossy(&stderr);
    let lines: Vec<&str> = said.lines().map(str::trim).collect();
    Err(Error::Failed {
        program: program.to_owned(),
        status,
        said: lines.join(" "),
    })
}

/// All that comes out of a pipe.
fn all_of(pipe: Option<impl Read>) -> Vec<u8> {
    let mut all = Vec::new();
    if let Some(mut pipe) = pipe {
        // What was read before a fault is worth as much.
        let _ = pipe.read_to_end(&mut all);
    }
    all
}

/// Waits for a program, and ends one that takes too long.
fn wait(child: &mut Child, patience: Duration) -> io::Result<Option<ExitStatus>> {
    let begun = Instant::now();
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if begun.elapsed() > patience {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(LOOK_EVERY);
    }
}

/// Where programs are looked for.
pub fn directories(path: Option<OsString>) -> Vec<PathBuf> {
    let listed = path.iter().flat_map(env::split_paths);
    let listed = listed.filter(|directory| directory.is_absolute());
    listed.chain(SBIN.iter().map(PathBuf::from)).collect()
}

/// The first file of a name in some directories.
pub fn program(directories: &[PathBuf], name: &str) -> Option<PathBuf> {
    let mut candidates = directories.iter().map(|directory| directory.join(name));
    candidates.find(|candidate| candidate.is_file())
}

/// Which iptables the program that alternatives lead to belongs to.
fn variant(save: &Path) -> Option<Variant> {
    let output = run(save, &["--version"], "").ok()?;
    let said = String::from_utf8_lossy(&output.stdout);
    variant_of(&said)
}

/// `iptables-save v1.8.9 (nf_tables)`; before 1.8 there was one kind only, and no parentheses.
fn variant_of(version: &str) -> Option<Variant> {
    if version.contains("(nf_tables)") {
        Some(Variant::Nft)
    } else if version.contains(" v1.") {
        Some(Variant::Legacy)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kind_of_a_program_is_in_its_version() {
        let kind = |version| variant_of(version);
        assert_eq!(
            kind("iptables-save v1.8.9 (nf_tables)\n"),
            Some(Variant::Nft)
        );
        assert_eq!(
            kind("ip6tables-save v1.8.9 (legacy)\n"),
            Some(Variant::Legacy)
        );
        assert_eq!(kind("iptables-save v1.4.21"), Some(Variant::Legacy));
        assert_eq!(kind("BusyBox"), None);
    }

    #[test]
    fn programs_are_found_in_order_and_not_in_relative_directories() {
        let first = tempfile::tempdir().unwrap();
        let second = tempfile::tempdir().unwrap();
        for directory in [&first, &second] {
            fs::write(directory.path().join("iptables-save"), "").unwrap();
        }
        fs::create_dir(first.path().join("iptables-restore")).unwrap();
        let path = env::join_paths([Path::new("."), first.path(), second.path()]).unwrap();
        let directories = directories(Some(path));
        assert_eq!(directories[0], first.path());
        assert_eq!(
            program(&directories, "iptables-save"),
            Some(first.path().join("iptables-save"))
        );
        let restore = program(&directories[..2], "iptables-restore");
        assert_eq!(restore, None, "a directory is no program");
    }

    #[test]
    fn a_program_that_fails_is_named_with_what_it_said() {
        let error = run(Path::new("/bin/sh"), &["-s"], "echo bad line >&2; exit 3").unwrap_err();
        let said = error.to_string();
        assert!(said.contains("/bin/sh"), "{said}");
        assert!(said.contains("bad line"), "{said}");
        let missing = run(Path::new("/nowhere/iptables-save"), &[], "").unwrap_err();
        assert!(missing.to_string().contains("/nowhere/iptables-save"));
    }

    #[test]
    fn a_program_that_does_not_end_is_ended() {
        let sleep = run_within(
            Duration::from_millis(50),
            Path::new("/bin/sh"),
            &["-c", "exec sleep 3600"],
            "",
        );
        let error = sleep.unwrap_err();
        assert!(error.is_timeout(), "{error}");
        assert!(error.to_string().contains("/bin/sh did not end"), "{error}");
    }

    #[test]
    fn a_program_may_print_before_it_has_read_everything() {
        let much = "x".repeat(1 << 20);
        let output = run(Path::new("/bin/cat"), &[], &much).unwrap();
        assert_eq!(output.stdout.len(), much.len());
    }
}
