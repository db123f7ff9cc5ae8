//! `docs/compatibility.md` claims nothing that it cannot show: no cell of its tables is empty,
//! and every test it names exists.

use std::fs;
use std::path::Path;

/// The tables by their heading, what nftlet is compared with in them, and how many lines each has
/// at least.
const TABLES: [(&str, &str, usize); 11] = [
    ("Service fields", "kube-proxy", 10),
    ("Endpoint fields", "kube-proxy", 7),
    ("Which endpoints", "kube-proxy", 4),
    ("What packets must meet", "kube-proxy", 15),
    ("Node", "kube-proxy", 7),
    ("Conntrack", "kube-proxy", 5),
    ("Network policies", "The API", 30),
    ("Command line and configuration", "kube-proxy", 12),
    ("HTTP", "kube-proxy", 6),
    ("Start, end and change of proxies", "kube-proxy", 7),
    ("What kube-proxy has wrong", "kube-proxy", 10),
];

fn read(path: &str) -> Option<String> {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).ok()
}

/// The cells of a table's line.
fn cells(line: &str) -> Vec<&str> {
    let inner = line
        .strip_prefix('|')
        .and_then(|rest| rest.strip_suffix('|'));
    let inner = inner.unwrap_or_else(|| panic!("a table's line begins and ends with |: {line}"));
    inner.split('|').map(str::trim).collect()
}

/// What is between backticks.
fn code(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Whether a test exists: `FILE::FUNCTION`, or `golden/CASE`.
fn exists(test: &str) -> bool {
    if let Some(case) = test.strip_prefix("golden/") {
        return !case.is_empty() && read(&format!("tests/golden/{case}/expected.nft")).is_some();
    }
    let Some((file, function)) = test.split_once("::") else {
        return false;
    };
    let path = if file.starts_with("src/") {
        file.to_owned()
    } else {
        format!("tests/it/{file}")
    };
    read(&path).is_some_and(|source| has_test(&source, function))
}

/// Whether a function of this name is marked as a test: in the lines above it, up to the end of
/// what came before.
fn has_test(source: &str, function: &str) -> bool {
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    let head = format!("fn {function}(");
    lines.iter().enumerate().any(|(at, line)| {
        let above = lines.iter().take(at).rev();
        line.trim_start_matches("async ").starts_with(&head)
            && above
                .take_while(|line| !line.is_empty() && **line != "}")
                .any(|line| {
                    ["#[test]", "#[tokio::test"]
                        .iter()
                        .any(|m| line.starts_with(m))
                })
    })
}

/// Everything that is wrong with the text.
fn faults(text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    for (heading, other, least) in TABLES {
        let section = text.split("\n## ").find_map(|section| {
            let (title, rest) = section.split_once('\n')?;
            (title == heading).then_some(rest)
        });
        let Some(section) = section else {
            faults.push(format!("there is no section {heading}"));
            continue;
        };
        let table: Vec<_> = section
            .lines()
            .filter(|line| line.starts_with('|'))
            .map(cells)
            .collect();
        match table.first() {
            Some(header) if header.len() == 4 && header[1..] == [other, "nftlet", "Test"] => {}
            header => faults.push(format!("{heading}: the header is {header:?}")),
        }
        let rows = table.get(2..).unwrap_or_default();
        if rows.len() < least {
            let count = rows.len();
            faults.push(format!(
                "{heading} has {count} lines, and {least} are known"
            ));
        }
        faults.extend(rows.iter().flat_map(|row| row_faults(row)));
    }
    faults
}

fn row_faults(row: &[&str]) -> Vec<String> {
    let what = row.first().copied().unwrap_or_default();
    let [_, _, _, tests] = row else {
        return vec![format!("{what}: {} cells", row.len())];
    };
    let mut faults = Vec::new();
    if row.iter().any(|cell| cell.is_empty()) {
        faults.push(format!("{what}: a cell is empty"));
    }
    if code(tests).next().is_none() && !tests.starts_with("None") {
        faults.push(format!("{what}: no test is named"));
    }
    let missing = code(tests).filter(|test| !exists(test));
    faults.extend(missing.map(|test| format!("{what}: there is no test {test}")));
    faults
}

#[test]
fn every_line_names_tests_that_exist() {
    let text = read("docs/compatibility.md").expect("the document");
    let faults = faults(&text);
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn faults_are_found() {
    for (row, fault) in [
        ("| a | b | | None |", "a: a cell is empty"),
        ("| a | b | c |", "a: 3 cells"),
        ("| a | b | c | later |", "a: no test is named"),
        (
            "| a | b | c | `golden/nothing` |",
            "a: there is no test golden/nothing",
        ),
        (
            "| a | b | c | `golden.rs` |",
            "a: there is no test golden.rs",
        ),
        (
            "| a | b | c | `compatibility.rs::cells` |",
            "a: there is no test compatibility.rs::cells",
        ),
        (
            "| a | b | c | `compatibility.rs::nothing` |",
            "a: there is no test compatibility.rs::nothing",
        ),
    ] {
        assert_eq!(row_faults(&cells(row)), [fault], "{row}");
    }
    let fine = "| a | b | c | `compatibility.rs::faults_are_found`, `golden/shop` |";
    assert_eq!(row_faults(&cells(fine)), Vec::<String>::new());
    assert_eq!(faults("## Elsewhere\n").len(), TABLES.len());
}
