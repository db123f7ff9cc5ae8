//! What the documents name: flags, metrics, alerts, reasons of Events and messages.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{code, documents, files, is_word, lines, read, spans, words};

/// The page that names every flag.
const CONFIGURATION: &str = "docs/configuration.md";

/// The page that names every metric, alert and reason of an Event.
const MONITORING: &str = "docs/monitoring.md";

/// The page that quotes messages, in tables whose first column is `Message`.
const TROUBLESHOOTING: &str = "docs/troubleshooting.md";

/// Flags of other programs that documents name without their program.
const FOREIGN_FLAGS: [&str; 3] = ["--node", "--offline", "--skip-phases"];

/// Documents about programs with flags of their own.
const OTHER_PROGRAMS: [&str; 1] = ["docs/benchmarks.md"];

/// How names of metrics begin.
const METRICS: [&str; 4] = ["kubeproxy_", "nftlet_", "process_", "rest_client_"];

/// What a histogram adds to its name.
const SAMPLES: [&str; 3] = ["_bucket", "_count", "_sum"];

/// The source of the library without its tests, by path.
fn sources() -> Vec<String> {
    let mut paths = Vec::new();
    files(Path::new("src"), "rs", &mut paths);
    let is_test = |path: &PathBuf| path.components().any(|it| it.as_os_str() == "tests");
    paths.retain(|path| !is_test(path) && !path.ends_with("tests.rs"));
    let without_tests = |path| {
        let text = read(path);
        let end = text.find("#[cfg(test)]\nmod tests {");
        text[..end.unwrap_or(text.len())].to_owned()
    };
    paths.into_iter().map(without_tests).collect()
}

/// The flags that a document names: code that begins with one, and command lines of nftlet.
fn flags(text: &str) -> BTreeSet<String> {
    let flag = |word: &str| {
        let end = word.find(|c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-'));
        let (flag, rest) = word.split_at(end.unwrap_or(word.len()));
        // `--conntrack-*` is a group of flags.
        (flag.len() > 2 && !rest.starts_with('*')).then(|| flag.to_owned())
    };
    let mut found = BTreeSet::new();
    let spans = spans(text);
    for span in spans.iter().filter(|span| span.starts_with("--")) {
        found.extend(flag(span));
    }
    let commands = lines(text).1.join("\n").replace("\\\n", " ");
    for line in commands.lines().chain(spans.iter().map(String::as_str)) {
        let line = line.split(" | ").last().unwrap_or(line);
        let words = line.split_whitespace().skip_while(|word| *word != "nftlet");
        found.extend(words.filter(|word| word.starts_with("--")).filter_map(flag));
    }
    found.retain(|flag| !FOREIGN_FLAGS.contains(&flag.as_str()));
    found
}

fn nftlet(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_nftlet"))
        .args(arguments)
        .output();
    let output = output.expect("nftlet can be started");
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// The flags that `--help` shows.
fn shown_flags() -> BTreeSet<String> {
    let help = nftlet(&["--help"]);
    let names = help.lines().filter_map(|line| {
        let line = line.trim_start();
        let line = line.strip_prefix('-').and(line.split(", ").last())?;
        let name = line.split(['[', ' ']).next()?;
        name.starts_with("--").then(|| name.to_owned())
    });
    names.collect()
}

/// Whether nftlet or one of its subcommands takes a flag, hidden ones included. A second flag that
/// cannot exist keeps it from doing anything.
fn takes(flag: &str) -> bool {
    let takes = |subcommand: &[&str]| {
        let said = nftlet(&[subcommand, &[flag, "--no-such-flag"]].concat());
        !said.contains(&format!("unexpected argument '{flag}'"))
    };
    takes(&[])
        || [
            "audit", "explain", "policies", "reach", "services", "status",
        ]
        .iter()
        .any(|it| takes(&[*it]))
}

/// The names of metrics in a text.
fn metrics(text: &str) -> BTreeSet<String> {
    let names = words(text).filter(|word| METRICS.iter().any(|it| word.starts_with(it)));
    names
        .filter(|word| !word.ends_with('_'))
        .map(str::to_owned)
        .collect()
}

/// The names of the metrics that the source registers: its texts that are nothing but such a name.
fn registered() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for source in sources() {
        for text in source.split('"') {
            let name = text.chars().all(|c| c.is_ascii_lowercase() || c == '_');
            if name && METRICS.iter().any(|it| text.starts_with(it)) {
                found.insert(text.to_owned());
            }
        }
    }
    found
}

/// The messages that a page quotes: the code in the first column of tables that begin with
/// `Message`, in parts where it varies.
fn messages(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut quotes = false;
    for line in lines(text).0 {
        if !line.starts_with('|') {
            quotes = false;
        } else if line.starts_with("| Message |") {
            quotes = true;
        } else if quotes {
            let cell = line[1..].split('|').next().unwrap_or_default();
            let parts = code(cell).flat_map(|message| message.split("..."));
            let parts = parts.map(|part| part.trim_matches([' ', ':', ';', ',']));
            found.extend(parts.filter(|part| !part.is_empty()).map(str::to_owned));
        }
    }
    found
}

/// Source on one line, with texts that go over several lines in one piece.
fn flattened(source: &str) -> String {
    let mut flat = String::with_capacity(source.len());
    let mut lines = source.lines();
    while let Some(line) = lines.next() {
        let mut line = line;
        while let Some(begun) = line.strip_suffix('\\') {
            flat.push_str(begun);
            line = lines.next().unwrap_or_default().trim_start();
        }
        flat.push_str(line);
        flat.push('\n');
    }
    flat
}

fn missing<'a>(wanted: impl IntoIterator<Item = &'a String>, text: &str) -> Vec<&'a String> {
    let named: BTreeSet<String> = spans(text)
        .iter()
        .flat_map(|span| {
            span.split(|c: char| !is_word(c) && c != '-')
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })
        .collect();
    wanted
        .into_iter()
        .filter(|name| !named.contains(*name))
        .collect()
}

#[test]
fn flags_that_exist_are_named_and_those_that_are_named_exist() {
    let shown = shown_flags();
    assert!(shown.len() > 30 && shown.contains("--config"), "{shown:?}");
    let missing = missing(&shown, &read(CONFIGURATION));
    assert!(
        missing.is_empty(),
        "{CONFIGURATION} does not name {missing:?}"
    );
    let documents = documents().into_iter();
    for (path, text) in documents.filter(|(path, _)| !OTHER_PROGRAMS.contains(&path.as_str())) {
        for flag in flags(&text) {
            assert!(
                takes(&flag),
                "{path} names {flag}, which nftlet does not take"
            );
        }
    }
}

#[test]
fn metrics_that_exist_are_named_and_those_that_are_named_exist() {
    let registered = registered();
    assert!(registered.len() > 40, "{registered:?}");
    let missing = missing(&registered, &read(MONITORING));
    assert!(missing.is_empty(), "{MONITORING} does not name {missing:?}");
    for (path, text) in documents() {
        for name in metrics(&text) {
            let base = SAMPLES.iter().find_map(|it| name.strip_suffix(it));
            let exists = |name: &str| registered.contains(name);
            assert!(
                exists(&name) || base.is_some_and(exists),
                "{path} names {name}, which is no metric"
            );
        }
    }
}

#[test]
fn alerts_and_reasons_of_events_are_named_and_exist() {
    let rules = read("manifests/components/monitoring/alerts.yaml");
    let alerts = rules
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- alert: "));
    let alerts: BTreeSet<String> = alerts.map(str::to_owned).collect();
    let reasons: BTreeSet<String> = sources()
        .iter()
        .flat_map(|source| {
            let after = source.split("Reason::").skip(1);
            let names = after.filter_map(|after| words(after).next());
            let variants = names.filter(|name| name.contains(|c: char| c.is_lowercase()));
            let variants = variants.filter(|name| name.starts_with(char::is_uppercase));
            variants.map(str::to_owned).collect::<Vec<_>>()
        })
        .collect();
    assert!(
        alerts.len() > 10 && reasons.len() > 15,
        "{alerts:?} {reasons:?}"
    );
    let missing = missing(alerts.iter().chain(&reasons), &read(MONITORING));
    assert!(missing.is_empty(), "{MONITORING} does not name {missing:?}");
    for (path, text) in documents() {
        for name in spans(&text)
            .iter()
            .filter(|span| span.starts_with("Nftlet"))
        {
            assert!(
                alerts.contains(name),
                "{path} names {name}, which is no alert"
            );
        }
    }
}

#[test]
fn messages_that_are_quoted_exist() {
    let messages = messages(&read(TROUBLESHOOTING));
    assert!(messages.len() > 30, "{messages:?}");
    let sources: Vec<String> = sources().iter().map(|source| flattened(source)).collect();
    let unknown: Vec<&String> = messages
        .iter()
        .filter(|message| !sources.iter().any(|source| source.contains(*message)))
        .collect();
    assert!(unknown.is_empty(), "{TROUBLESHOOTING} quotes {unknown:#?}");
}

#[test]
fn images_have_the_version_of_the_package() {
    let version = env!("CARGO_PKG_VERSION");
    for (path, text) in documents() {
        for tag in text.split("/nftlet:").skip(1) {
            let end = tag.find(|c: char| !(c.is_ascii_digit() || c == '.'));
            let tag = tag[..end.unwrap_or(tag.len())].trim_end_matches('.');
            assert_eq!(tag, version, "{path}");
        }
    }
    let entry = format!("\n## {version}\n");
    assert!(
        read("CHANGELOG.md").contains(&entry),
        "CHANGELOG.md has no entry {version}"
    );
}

#[test]
fn names_are_found() {
    let text =
        "`--a-flag=x`, `--some-*`, `cargo --no`\n\n```sh\nx | nftlet --b \\\n  --c FILE\n```\n";
    let expected = ["--a-flag", "--b", "--c"].map(str::to_owned);
    assert_eq!(flags(text), BTreeSet::from(expected));
    assert!(takes("--dry-run") && takes("--vmodule") && !takes("--dry-walk"));
    let metrics = metrics("`nftlet_a_total{x}` sum(rate(nftlet_b_sum[5m])) `process_*`");
    assert_eq!(
        metrics,
        BTreeSet::from(["nftlet_a_total", "nftlet_b_sum"].map(str::to_owned))
    );
    let quoted = "| Message | Meaning |\n|---|---|\n| `a ...: b`, `c` | `d` |\n\n| x |\n| `y` |\n";
    assert_eq!(messages(quoted), ["a", "b", "c"]);
}
