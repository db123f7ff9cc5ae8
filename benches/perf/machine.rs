//! The machine that measures, and the state of the source that is measured.

use std::collections::BTreeMap;
use std::process::Command;
use std::{fs, thread};

use nix::sched::{CloneFlags, unshare};

/// Returns why this process cannot program network namespaces with large rulesets.
pub fn refusal() -> Option<String> {
    // On a thread of its own, so that this one stays where it is.
    let attempt = thread::spawn(|| unshare(CloneFlags::CLONE_NEWNET)).join();
    if let Ok(Err(error)) = attempt {
        return Some(format!("creating a network namespace fails: {error}"));
    }
    // The map of the first user namespace covers every number; others limit transactions of nft.
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let first = map.split_whitespace().eq(["0", "0", "4294967295"]);
    (!first).then(|| "this is a user namespace".to_owned())
}

/// Returns what identifies a measurement: source, time and machine.
pub fn facts() -> BTreeMap<&'static str, String> {
    let read = |path| {
        fs::read_to_string(path)
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let model = model.map(|rest| rest.trim_start_matches([' ', '\t', ':']).to_owned());
    let count = thread::available_parallelism().map_or(0, usize::from);
    let now = jiff::Timestamp::now().to_string();
    BTreeMap::from([
        ("commit", commit().unwrap_or_else(|| "unknown".to_owned())),
        ("date", now.split('T').next().unwrap_or_default().to_owned()),
        ("kernel", read("/proc/sys/kernel/osrelease")),
        ("processor", model.unwrap_or_else(|| "unknown".to_owned())),
        ("processors", count.to_string()),
        (
            "nft",
            output("nft", &["--version"]).unwrap_or_else(|| "unknown".to_owned()),
        ),
    ])
}

/// Returns the commit that is checked out, with `-dirty` where files differ from it.
fn commit() -> Option<String> {
    let directory = env!("CARGO_MANIFEST_DIR");
    // The directory may belong to another user than root, who measures.
    let trusted = format!("safe.directory={directory}");
    let describe = [
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude=*",
    ];
    output(
        "git",
        &[&["-c", &trusted, "-C", directory], &describe[..]].concat(),
    )
}

fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
