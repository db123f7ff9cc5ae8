//! Layering: which module of the source may use which, and where `unsafe` may be.
//!
//! Data flows one way (see the crate's documentation), so each top-level module lists here what
//! it may import. A module that is not in the table fails the test: add it with its neighbours.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// Each top-level module of the library with the modules of the library it may use.
pub const LAYERS: &[(&str, &[&str])] = &[
    ("model", &[]),
    ("backoff", &[]),
    ("clock", &[]),
    ("mutex", &[]),
    ("logging", &["mutex"]),
    ("host", &["model"]),
    ("settings", &[]),
    ("serve", &["logging", "backoff", "mutex"]),
    ("nft", &[]),
    ("netlink", &["nft", "mutex"]),
    ("engine", &["model", "nft"]),
    ("source", &["model", "serve", "logging", "backoff", "mutex"]),
    ("services", &["model", "nft", "engine", "clock"]),
    ("policies", &["model", "nft", "engine", "logging"]),
    (
        "sync",
        &[
            "model", "nft", "netlink", "engine", "services", "policies", "source", "serve",
            "logging", "backoff", "mutex",
        ],
    ),
    (
        "followers",
        &[
            "model", "nft", "netlink", "services", "policies", "sync", "serve", "host", "engine",
            "backoff", "mutex",
        ],
    ),
    ("events", &["model", "serve", "logging", "backoff"]),
    (
        "cleanup",
        &["services", "policies", "nft", "netlink", "host", "backoff"],
    ),
    (
        "insight",
        &["model", "nft", "engine", "services", "policies"],
    ),
    (
        "app",
        &[
            "insight",
            "model",
            "logging",
            "host",
            "settings",
            "serve",
            "nft",
            "netlink",
            "engine",
            "source",
            "services",
            "policies",
            "sync",
            "followers",
            "events",
            "mutex",
            "cleanup",
            "backoff",
        ],
    ),
    // The root of the library only declares modules; the binary only hands over to `app`.
    ("lib", &[]),
    ("main", &["app"]),
];

/// The one module that may contain `unsafe`.
const UNSAFE: &str = "netlink";

/// Macros that must not stay in the source.
const UNFINISHED: [&str; 3] = ["todo", "unimplemented", "dbg"];

/// Macros that panic where nothing can be written, and block where nothing reads.
const PRINTING: [&str; 4] = ["print", "println", "eprint", "eprintln"];

/// A broken rule.
#[derive(Debug, PartialEq, Eq)]
struct Breach {
    line: usize,
    what: String,
}

impl fmt::Display for Breach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.line, self.what)
    }
}

/// A word, or one character of anything else, with its line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token<'a> {
    pub text: &'a str,
    line: usize,
}

/// Splits Rust source into tokens, leaving out comments, strings and characters.
pub fn tokens(source: &str) -> Vec<Token<'_>> {
    let mut found = Vec::new();
    let (mut at, mut line) = (0, 1);
    while let Some(first) = source[at..].chars().next() {
        let rest = &source[at..];
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            block_comment(rest)
        } else if let Some(length) = raw_string(rest) {
            length
        } else if first == '"' {
            quoted(rest, '"')
        } else if first == '\'' {
            character(rest)
        } else {
            let length = if is_word(first) {
                rest.find(|c| !is_word(c)).unwrap_or(rest.len())
            } else {
                first.len_utf8()
            };
            if !first.is_whitespace() {
                let text = &rest[..length];
                found.push(Token { text, line });
            }
            length
        };
        line += rest[..length].matches('\n').count();
        at += length;
    }
    found
}

/// The length of the block comment at the start of the text; they nest.
fn block_comment(text: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        if text[at..].starts_with("/*") {
            depth += 1;
            at += 2;
        } else if text[at..].starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += text[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    at
}

/// The length of the raw string at the start of the text, if there is one.
fn raw_string(text: &str) -> Option<usize> {
    let body = text.strip_prefix('b').unwrap_or(text).strip_prefix('r')?;
    let hashes = body.len() - body.trim_start_matches('#').len();
    let content = body[hashes..].strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    let closed = content.find(&end).map_or(content.len(), |i| i + end.len());
    Some(text.len() - content.len() + closed)
}

/// The length of what the mark at the start of the text quotes, with both marks.
fn quoted(text: &str, mark: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if c == mark => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// The length of the character literal at the start of the text, or of the mark of a lifetime.
fn character(text: &str) -> usize {
    let mut following = text.chars().skip(1);
    match (following.next(), following.next()) {
        (Some('\\'), _) | (Some(_), Some('\'')) => quoted(text, '\''),
        _ => 1,
    }
}

/// The top-level modules that a file names with a path from the root of the library, with lines.
///
/// A path starts with `crate::`, or with `nftlet::` in the binary; in a group of imports each
/// member counts. Paths with `super` are resolved by the depth of the file, since enough of them
/// lead out of a top-level module, too.
fn imports<'a>(tokens: &[Token<'a>], depth: usize) -> Vec<Token<'a>> {
    let mut found = Vec::new();
    // Modules written inside the file add to the depth while their braces are open.
    let (mut braces, mut inner) = (0_usize, Vec::new());
    let mut at = 0;
    while at < tokens.len() {
        let text = tokens[at].text;
        let next = |n: usize| tokens.get(at + n).map_or("", |t| t.text);
        let starts_path = at == 0 || !is_path_separator(tokens, at.wrapping_sub(2));
        match text {
            "{" => braces += 1,
            "}" => {
                inner.retain(|&opened| opened < braces);
                braces = braces.saturating_sub(1);
            }
            "mod" if next(2) == "{" => inner.push(braces + 1),
            "crate" | "nftlet" if starts_path && is_path_separator(tokens, at + 1) => {
                members(tokens, at + 3, &mut found);
            }
            "super" if starts_path => {
                let mut ups = 1;
                let mut end = at + 1;
                while is_path_separator(tokens, end)
                    && tokens.get(end + 2).is_some_and(|t| t.text == "super")
                {
                    ups += 1;
                    end += 3;
                }
                if ups >= depth + inner.len() && is_path_separator(tokens, end) {
                    members(tokens, end + 2, &mut found);
                }
                at = end;
                continue;
            }
            _ => {}
        }
        at += 1;
    }
    found
}

pub fn is_path_separator(tokens: &[Token<'_>], at: usize) -> bool {
    let colon = |i: usize| tokens.get(i).is_some_and(|t| t.text == ":");
    colon(at) && colon(at.wrapping_add(1))
}

/// The first names of what follows a path's root: one name, or each member of a group.
fn members<'a>(tokens: &[Token<'a>], at: usize, found: &mut Vec<Token<'a>>) {
    let Some(first) = tokens.get(at) else { return };
    if first.text != "{" {
        found.push(*first);
        return;
    }
    let (mut depth, mut starts) = (0, false);
    for token in &tokens[at..] {
        match token.text {
            "{" => {
                depth += 1;
                starts = depth == 1;
            }
            "}" => {
                depth -= 1;
                if depth == 0 {
                    return;
                }
            }
            "," => starts = depth == 1,
            _ if starts => {
                found.push(*token);
                starts = false;
            }
            _ => {}
        }
    }
}

/// The rules that a source file breaks. `path` is relative to the source folder.
fn breaches(path: &Path, source: &str) -> Vec<Breach> {
    let parts: Vec<String> = path
        .with_extension("")
        .iter()
        .map(|part| part.to_string_lossy().into_owned())
        .collect();
    let own = parts[0].as_str();
    let tokens = tokens(source);
    let mut broken = Vec::new();
    let mut report = |line, what: String| broken.push(Breach { line, what });

    let Some((_, allowed)) = LAYERS.iter().find(|(module, _)| *module == own) else {
        report(1, format!("the module `{own}` is not in the table"));
        return broken;
    };
    // The number of `super` that lead from the file to the root of the library.
    let is_root = own == "lib" || own == "main";
    let is_folder = parts.last().is_some_and(|name| name == "mod");
    let depth = parts.len() - usize::from(is_folder || is_root);
    for import in imports(&tokens, depth) {
        let to = import.text;
        let known = LAYERS.iter().any(|(module, _)| *module == to);
        if to == "*" || to == "self" {
            report(import.line, format!("`{own}` imports the root as a whole"));
        } else if known && to != own && !allowed.contains(&to) {
            report(import.line, format!("`{own}` must not use `{to}`"));
        } else if !known && !is_root {
            report(import.line, format!("`{to}` is no module of the table"));
        }
    }
    for (at, token) in tokens.iter().enumerate() {
        let followed = |by: &str| tokens.get(at + 1).is_some_and(|t| t.text == by);
        if token.text == "unsafe" && own != UNSAFE {
            report(token.line, format!("`unsafe` outside of `{UNSAFE}`"));
        }
        if UNFINISHED.contains(&token.text) && followed("!") {
            report(token.line, format!("`{}!` is left over", token.text));
        }
        if PRINTING.contains(&token.text) && followed("!") {
            report(token.line, format!("`{}!` may panic", token.text));
        }
    }
    broken
}

/// All Rust files below a folder.
pub fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    let entries = fs::read_dir(folder).expect("the source folder can be read");
    for entry in entries {
        let path = entry.expect("the source folder can be read").path();
        if path.is_dir() {
            files(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn the_source_obeys() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut sources = Vec::new();
    files(&root, &mut sources);
    sources.sort();
    assert!(sources.len() > 3, "the sources are found: {sources:?}");
    let mut report = String::new();
    for file in sources {
        let source = fs::read_to_string(&file).expect("a source file can be read");
        let path = file.strip_prefix(&root).expect("files are below the root");
        for breach in breaches(path, &source) {
            report.push_str(&format!("src/{}:{breach}\n", path.display()));
        }
    }
    assert!(
        report.is_empty(),
        "rules of the source are broken:\n{report}"
    );
}

/// What the rules say about one line in a file.
fn says(path: &str, source: &str) -> Vec<String> {
    let found = breaches(Path::new(path), source);
    found.iter().map(ToString::to_string).collect()
}

#[test]
fn allowed_imports_pass() {
    assert!(says("services/service.rs", "use crate::model::Service;").is_empty());
    assert!(says("services/mod.rs", "use crate::{model::{Port, Name}, nft};").is_empty());
    assert!(
        says(
            "model/store.rs",
            "use crate::model::Name; use super::facts;"
        )
        .is_empty()
    );
    assert!(
        says(
            "sync.rs",
            "use crate::serve::health::Health; fn f() { crate::netlink::x() }"
        )
        .is_empty()
    );
    assert!(says("main.rs", "fn main() { nftlet::app::run() }").is_empty());
    assert!(says("lib.rs", "pub mod model; pub(crate) mod app;").is_empty());
    assert!(says("settings.rs", "pub(crate) fn f() {}").is_empty());
}

#[test]
fn nothing_is_printed_but_through_the_log_or_with_an_error() {
    for macro_ in PRINTING {
        let source = format!("fn f() {{\n    {macro_}!(\"x\");\n}}");
        assert_eq!(
            says("app.rs", &source),
            [format!("2: `{macro_}!` may panic")]
        );
    }
    assert!(says("app.rs", "fn print() {} // eprintln!()").is_empty());
}

#[test]
fn forbidden_imports_fail() {
    let one = |path, source, want: &str| assert_eq!(says(path, source), [want], "{source}");
    one(
        "model/facts.rs",
        "\nuse crate::source::X;",
        "2: `model` must not use `source`",
    );
    one(
        "services/mod.rs",
        "use crate::{model, netlink::{A, B}};",
        "1: `services` must not use `netlink`",
    );
    one(
        "nft.rs",
        "fn f(x: crate::model::Name) {}",
        "1: `nft` must not use `model`",
    );
    one(
        "sync/mod.rs",
        "use crate::app::run;",
        "1: `sync` must not use `app`",
    );
    one(
        "source/mod.rs",
        "use super::services;",
        "1: `source` must not use `services`",
    );
    one(
        "source/cluster/watch.rs",
        "use super::super::super::netlink;",
        "1: `source` must not use `netlink`",
    );
    one(
        "serve.rs",
        "mod tests { use super::super::settings; }",
        "1: `serve` must not use `settings`",
    );
    one(
        "settings.rs",
        "use crate::*;",
        "1: `settings` imports the root as a whole",
    );
    one(
        "main.rs",
        "use nftlet::model;",
        "1: `main` must not use `model`",
    );
    one(
        "settings.rs",
        "use crate::helpers;",
        "1: `helpers` is no module of the table",
    );
    one(
        "helpers.rs",
        "",
        "1: the module `helpers` is not in the table",
    );
}

#[test]
fn tests_inside_the_source_obey_too() {
    let source = "#[cfg(test)]\nmod tests {\n    use super::*;\n    use crate::netlink::Batch;\n}";
    assert_eq!(
        says("model/facts.rs", source),
        ["4: `model` must not use `netlink`"]
    );
    // `super` inside the inner module is the file itself.
    assert!(says("serve.rs", "mod tests { use super::settings; }").is_empty());
    assert_eq!(
        says(
            "serve.rs",
            "mod tests { use super::x; }\nuse super::settings;"
        ),
        ["2: `serve` must not use `settings`"]
    );
}

#[test]
fn words_in_comments_and_strings_do_not_count() {
    let source = r##"
        //! [`crate::netlink`] has the unsafe code. todo!()
        /* use crate::source; /* unsafe */ dbg!() */
        const A: &str = "unsafe \" crate::source";
        const B: &str = r#"unsafe "crate::source" "#;
        const C: char = '"'; const D: char = '\''; const E: &'static str = "unsafe";
    "##;
    assert_eq!(says("model/mod.rs", source), Vec::<String>::new());
}

#[test]
fn unsafe_and_unfinished_code_fail() {
    assert_eq!(
        says("services/mod.rs", "fn f() { unsafe { g() } }"),
        ["1: `unsafe` outside of `netlink`"]
    );
    assert!(says("netlink/sys.rs", "fn f() { unsafe { g() } }").is_empty());
    for left_over in ["todo!()", "unimplemented!(\"x\")", "dbg!(1)"] {
        let found = says("settings.rs", &format!("fn f() {{\n {left_over};\n}}"));
        assert_eq!(found.len(), 1, "{left_over}");
        assert!(found[0].starts_with("2: "), "{found:?}");
    }
    assert!(says("settings.rs", "#![deny(unsafe_code)] fn dbg() {}").is_empty());
}
