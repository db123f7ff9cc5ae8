//! The documents agree with the source: links lead to something, items that links name exist, and
//! what users can set, measure or be warned of is named, and exists where it is named.

mod links;
mod names;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// All documents, with the most words that each may have.
const DOCUMENTS: [(&str, usize); 14] = [
    ("ARCHITECTURE.md", 2_550),
    ("CHANGELOG.md", 650),
    ("CONTRIBUTING.md", 800),
    ("README.md", 1_150),
    ("docs/benchmarks.md", 2_500),
    ("docs/compatibility.md", 2_400),
    ("docs/configuration.md", 1_500),
    ("docs/insight.md", 2_150),
    ("docs/install.md", 1_550),
    ("docs/monitoring.md", 1_600),
    ("docs/network-policies.md", 1_500),
    ("docs/ruleset.md", 1_500),
    ("docs/security.md", 1_600),
    ("docs/troubleshooting.md", 1_750),
];

/// The most words of all documents.
const MOST_WORDS: usize = 21_200;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The files below a folder with one of these extensions, relative to the root of the repository.
fn files(folder: &Path, extension: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(root().join(folder)).expect("the folder can be read") {
        let entry = entry.expect("the folder can be read");
        let path = folder.join(entry.file_name());
        let name = entry.file_name();
        let hidden = name.to_string_lossy().starts_with('.');
        if entry.file_type().expect("a type").is_dir() {
            if !hidden && name != "target" {
                files(&path, extension, found);
            }
        } else if path.extension().is_some_and(|it| it == extension) {
            found.push(path);
        }
    }
}

/// All documents by their path.
fn documents() -> BTreeMap<String, String> {
    let mut paths = Vec::new();
    files(Path::new(""), "md", &mut paths);
    let read = |path: PathBuf| (path.to_string_lossy().into_owned(), read(&path));
    paths.into_iter().map(read).collect()
}

/// The lines of a document outside of fenced blocks, and those inside.
fn lines(text: &str) -> (Vec<&str>, Vec<&str>) {
    let (mut outside, mut inside, mut fenced) = (Vec::new(), Vec::new(), false);
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if fenced {
            inside.push(line);
        } else {
            outside.push(line);
        }
    }
    (outside, inside)
}

/// The text between backticks.
fn code(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The code spans of a document. A span does not go over the end of a paragraph.
fn spans(text: &str) -> Vec<String> {
    let (outside, _) = lines(text);
    let joined = outside.join("\n");
    let paragraphs = joined.split("\n\n").flat_map(|paragraph| {
        let table = paragraph.starts_with('|');
        let parts: Vec<&str> = if table {
            paragraph.lines().collect()
        } else {
            vec![paragraph]
        };
        parts
    });
    paragraphs
        .flat_map(|part| {
            code(part)
                .map(|span| span.replace('\n', " "))
                .collect::<Vec<_>>()
        })
        .collect()
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c| !is_word(c)).filter(|word| !word.is_empty())
}

#[test]
fn documents_are_short() {
    let bounds = BTreeMap::from(DOCUMENTS);
    let mut sum = 0;
    for (path, text) in documents() {
        let most = bounds.get(path.as_str());
        let most = most.unwrap_or_else(|| panic!("{path} has no bound: add it to the table"));
        // Numbers and the lines of tables are no words.
        let words = text.split_whitespace();
        let count = words
            .filter(|word| word.contains(char::is_alphabetic))
            .count();
        assert!(count <= *most, "{path} has {count} words of at most {most}");
        sum += count;
    }
    assert!(sum <= MOST_WORDS, "{sum} words of at most {MOST_WORDS}");
}
