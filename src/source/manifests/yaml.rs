//! Reading YAML text into [`Node`]s, one document and one list item at a time.
//!
//! A file is first cut at its `---` lines, so that a syntax error spoils one document and not
//! the file. Items of a list are handed out one by one while the document is being read: the
//! output of `kubectl get -o yaml` for a large cluster is a single list, and never has to be in
//! memory as a tree.
//!
//! A value that aliases refer to is held once, but is decoded for each of them: a few lines may
//! stand for more than any memory holds. What the aliases of a section stand for is bounded, and so
//! is how deep they nest.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use serde_saphyr::granit_parser::{
    Event, Marker, Options, Parser, ScalarStyle, ScanError, StrInput,
};

use super::tree::{Node, Position, Value};

/// How much the aliases of a section may stand for: the bytes of all scalars and keys, and
/// [`OVERHEAD`] for each value.
const MOST_EXPANDED: usize = 16 << 20;
/// What a value counts besides its text.
const OVERHEAD: usize = 16;
/// How deep values may nest with their aliases resolved. The parser itself has a smaller bound.
const DEEPEST: usize = 1000;

/// A place where the text is not YAML, and why.
#[derive(Debug)]
pub(super) struct SyntaxFault {
    pub at: Position,
    pub message: String,
}

/// One `---` section of a file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Section<'a> {
    /// The number of lines before it.
    pub lines_before: u64,
    /// Its text, the `---` line included.
    pub text: &'a str,
}

/// Cuts a file at its `---` lines. A line that begins so is a document marker wherever it
/// stands, even inside a block of text.
pub(super) fn sections(text: &str) -> Vec<Section<'_>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut cuts = vec![(0_usize, 0_u64)];
    let mut offset = 0;
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let marker = line
            .strip_prefix("---")
            .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']));
        if marker && offset > 0 {
            cuts.push((offset, number as u64));
        }
        offset += line.len();
    }
    let ends = cuts
        .iter()
        .skip(1)
        .map(|(start, _)| *start)
        .chain([text.len()]);
    cuts.iter()
        .zip(ends)
        .filter_map(|(&(start, lines_before), end)| {
            let text = text.get(start..end)?;
            let blank = |line: &str| {
                let line = line.trim();
                line.is_empty() || line.starts_with(['#', '%']) || line == "---" || line == "..."
            };
            (!text.lines().all(blank)).then_some(Section { lines_before, text })
        })
        .collect()
}

/// What [`read_section`] hands out.
pub(super) enum Part<'a> {
    /// An item of the root's `items`.
    Item(Node<'a>),
    /// A document; of a root with `items`, everything but the items.
    Document(Node<'a>),
}

/// Reads the documents of a section and hands them to `take`, the items of a list first.
///
/// # Errors
/// Where the text stops being YAML; what was handed out before that is sound.
pub(super) fn read_section<'a>(
    section: &Section<'a>,
    take: &mut dyn FnMut(Part<'a>),
) -> Result<(), SyntaxFault> {
    let mut options = Options::default();
    options.set_emit_comments(false);
    let mut reader = Reader {
        parser: Parser::new_from_str_with_options(section.text, options),
        lines_before: section.lines_before,
        anchors: HashMap::new(),
        size: 0,
        expanded: 0,
        depth: 0,
        deepest: 0,
    };
    loop {
        match reader.next()? {
            (Event::StreamEnd, _) => return Ok(()),
            // No alias can refer to the root: nothing comes after it.
            (Event::MappingStart(..), at) => {
                let value = Value::Mapping(merged(reader.root(take)?));
                take(Part::Document(Node { at, value }));
            }
            (event @ (Event::Scalar(..) | Event::SequenceStart(..) | Event::Alias(_)), at) => {
                let node = reader.node(event, at)?;
                take(Part::Document(node));
            }
            _ => {}
        }
    }
}

struct Reader<'a> {
    parser: Parser<'a, StrInput<'a>>,
    lines_before: u64,
    anchors: HashMap<usize, Anchored<'a>>,
    /// The size of all values so far, aliases resolved.
    size: usize,
    /// That of what aliases stand for.
    expanded: usize,
    /// The depth of the current value.
    depth: usize,
    /// The largest depth in the current value, aliases resolved.
    deepest: usize,
}

/// A value that aliases may refer to.
struct Anchored<'a> {
    node: Rc<Node<'a>>,
    size: usize,
    height: usize,
}

impl<'a> Reader<'a> {
    fn position(&self, mark: &Marker) -> Position {
        Position {
            line: self.lines_before + mark.line() as u64,
            column: mark.col() as u64 + 1,
        }
    }

    fn next(&mut self) -> Result<(Event<'a>, Position), SyntaxFault> {
        match self.parser.next_event() {
            None => Ok((Event::StreamEnd, Position { line: 0, column: 0 })),
            Some(Ok((event, span))) => Ok((event, self.position(&span.start))),
            Some(Err(fault)) => Err(self.syntax_fault(&fault)),
        }
    }

    fn syntax_fault(&self, fault: &ScanError) -> SyntaxFault {
        SyntaxFault {
            at: self.position(fault.marker()),
            message: fault.info(),
        }
    }

    /// The entries of a root mapping; the elements of a sequence named `items` go to `take`.
    fn root(
        &mut self,
        take: &mut dyn FnMut(Part<'a>),
    ) -> Result<Vec<(Cow<'a, str>, Node<'a>)>, SyntaxFault> {
        let mut entries = Vec::new();
        while let Some(key) = self.key()? {
            let (event, at) = self.next()?;
            if key == "items" && matches!(event, Event::SequenceStart(..)) {
                loop {
                    match self.next()? {
                        (Event::SequenceEnd, _) => break,
                        (event, at) => take(Part::Item(self.node(event, at)?)),
                    }
                }
                entries.push((
                    key,
                    Node {
                        at,
                        value: Value::Sequence(Vec::new()),
                    },
                ));
            } else {
                self.entry(&mut entries, key, event, at)?;
            }
        }
        Ok(entries)
    }

    /// The next key of a mapping, or `None` at its end.
    fn key(&mut self) -> Result<Option<Cow<'a, str>>, SyntaxFault> {
        match self.next()? {
            (Event::MappingEnd, _) => Ok(None),
            (Event::Scalar(text, ..), _) => Ok(Some(text)),
            (_, at) => Err(SyntaxFault {
                at,
                message: "a key must be a plain word or a quoted string".to_owned(),
            }),
        }
    }

    fn entry(
        &mut self,
        entries: &mut Vec<(Cow<'a, str>, Node<'a>)>,
        key: Cow<'a, str>,
        event: Event<'a>,
        at: Position,
    ) -> Result<(), SyntaxFault> {
        let node = self.node(event, at)?;
        // Bookkeeping of the API server, often larger than the rest of the object.
        if key != "managedFields" {
            entries.push((key, node));
        }
        Ok(())
    }

    /// Reads a value, which other values may refer to from then on if it has an anchor.
    fn node(&mut self, event: Event<'a>, at: Position) -> Result<Node<'a>, SyntaxFault> {
        let anchor = match &event {
            Event::Scalar(_, _, anchor, _)
            | Event::SequenceStart(_, anchor, _)
            | Event::MappingStart(_, anchor, _) => *anchor,
            Event::Alias(anchor) => return self.alias(*anchor, at),
            _ => 0,
        };
        self.depth += 1;
        let (before, outside) = (self.size, self.deepest);
        self.deepest = self.depth;
        self.size += OVERHEAD;
        let value = self.value(event, at)?;
        let (size, height) = (self.size - before, self.deepest - self.depth + 1);
        self.deepest = self.deepest.max(outside);
        self.depth -= 1;
        let node = Node { at, value };
        // 0 says that there is no anchor.
        if anchor == 0 {
            return Ok(node);
        }
        let node = Rc::new(node);
        let value = Value::Shared(node.clone());
        self.anchors.insert(anchor, Anchored { node, size, height });
        Ok(Node { at, value })
    }

    fn value(&mut self, event: Event<'a>, at: Position) -> Result<Value<'a>, SyntaxFault> {
        match event {
            Event::Scalar(text, style, ..) => {
                self.size += text.len();
                let plain = style == ScalarStyle::Plain;
                Ok(Value::Scalar { text, plain })
            }
            Event::SequenceStart(..) => {
                let mut items = Vec::new();
                loop {
                    match self.next()? {
                        (Event::SequenceEnd, _) => return Ok(Value::Sequence(items)),
                        (event, at) => items.push(self.node(event, at)?),
                    }
                }
            }
            Event::MappingStart(..) => {
                let mut entries = Vec::new();
                while let Some(key) = self.key()? {
                    self.size += key.len();
                    let (event, at) = self.next()?;
                    self.entry(&mut entries, key, event, at)?;
                }
                Ok(Value::Mapping(merged(entries)))
            }
            _ => Err(SyntaxFault {
                at,
                message: "the document ends in the middle of a value".to_owned(),
            }),
        }
    }

    fn alias(&mut self, anchor: usize, at: Position) -> Result<Node<'a>, SyntaxFault> {
        let fault = |message: String| SyntaxFault { at, message };
        let Some(anchored) = self.anchors.get(&anchor) else {
            let message = "an alias cannot refer to the value that contains it";
            return Err(fault(message.to_owned()));
        };
        self.size += anchored.size;
        self.expanded += anchored.size;
        self.deepest = self.deepest.max(self.depth + anchored.height);
        if self.expanded > MOST_EXPANDED {
            return Err(fault(format!(
                "the aliases up to here stand for more than {} MiB; write some of the values out \
                 in documents of their own",
                MOST_EXPANDED >> 20
            )));
        }
        if self.deepest > DEEPEST {
            return Err(fault(format!(
                "values nest more than {DEEPEST} deep here, with aliases resolved; write them with \
                 fewer levels"
            )));
        }
        let value = Value::Shared(anchored.node.clone());
        Ok(Node { at, value })
    }
}

/// Resolves `<<: *base`: the entries of the base that the mapping does not have itself, and of
/// several bases those of the first that has them.
fn merged<'a>(entries: Vec<(Cow<'a, str>, Node<'a>)>) -> Vec<(Cow<'a, str>, Node<'a>)> {
    let (bases, mut entries): (Vec<_>, Vec<_>) =
        entries.into_iter().partition(|(key, _)| key == "<<");
    if !bases.is_empty() {
        let mut known: HashSet<_> = entries.iter().map(|(key, _)| key.clone()).collect();
        for (_, base) in &bases {
            merge(&mut entries, &mut known, base);
        }
    }
    entries
}

fn merge<'a>(
    entries: &mut Vec<(Cow<'a, str>, Node<'a>)>,
    known: &mut HashSet<Cow<'a, str>>,
    base: &Node<'a>,
) {
    match &base.resolved().value {
        Value::Mapping(merged) => {
            for (key, node) in merged {
                if known.insert(key.clone()) {
                    let value = copy(node);
                    entries.push((key.clone(), Node { at: node.at, value }));
                }
            }
        }
        Value::Sequence(bases) => bases.iter().for_each(|base| merge(entries, known, base)),
        _ => {}
    }
}

fn copy<'a>(node: &Node<'a>) -> Value<'a> {
    let again = |node: &Node<'a>| Node {
        at: node.at,
        value: copy(node),
    };
    match &node.value {
        Value::Scalar { text, plain } => Value::Scalar {
            text: text.clone(),
            plain: *plain,
        },
        Value::Sequence(items) => Value::Sequence(items.iter().map(again).collect()),
        Value::Mapping(entries) => Value::Mapping(
            entries
                .iter()
                .map(|(key, node)| (key.clone(), again(node)))
                .collect(),
        ),
        Value::Shared(shared) => Value::Shared(shared.clone()),
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    fn documents(text: &str) -> (Vec<String>, Vec<SyntaxFault>) {
        let (mut seen, mut faults) = (Vec::new(), Vec::new());
        for section in sections(text) {
            let read = read_section(&section, &mut |part| match part {
                Part::Item(node) => seen.push(format!("item {}:{}", node.at.line, node.at.column)),
                Part::Document(node) => {
                    let kind = node.get("kind").and_then(Node::text).unwrap_or("?");
                    seen.push(format!("{kind} {}", node.at.line));
                }
            });
            faults.extend(read.err());
        }
        (seen, faults)
    }

    #[test]
    fn sections_are_cut_at_marker_lines_only() {
        let text =
            "# head\n---\na: 1\n--- # second\nb: |\n  x\n---not: a marker\n---\r\n# nothing\n---";
        let lines: Vec<u64> = sections(text)
            .iter()
            .map(|section| section.lines_before)
            .collect();
        assert_eq!(lines, [1, 3]);
    }

    #[test]
    fn items_come_before_the_rest_of_their_list() {
        let (seen, faults) =
            documents("apiVersion: v1\nitems:\n- a: 1\n-   b: 2\nkind: List\n---\nkind: Node\n");
        assert!(faults.is_empty(), "{faults:?}");
        assert_eq!(seen, ["item 3:3", "item 4:5", "List 1", "Node 7"]);
    }

    #[test]
    fn a_syntax_error_spoils_its_own_document_only() {
        let (seen, faults) = documents("kind: A\n---\nkind: B\n bad:\n---\nkind: C\n");
        assert_eq!(seen, ["A 1", "C 6"]);
        let lines: Vec<_> = faults
            .iter()
            .map(|fault| (fault.at.line, fault.at.column))
            .collect();
        assert_eq!(lines, [(4, 5)], "{faults:?}");
    }

    #[derive(Deserialize, Debug, PartialEq, Default)]
    #[serde(default)]
    struct Sample {
        name: Option<String>,
        number: Option<i64>,
        flag: Option<bool>,
        list: Option<Vec<Sample>>,
    }

    fn sample(text: &str) -> Result<Sample, super::super::tree::Fault> {
        let mut result = Ok(Sample::default());
        for section in sections(text) {
            read_section(&section, &mut |part| {
                if let Part::Document(node) = part {
                    result = Sample::deserialize(&node);
                }
            })
            .expect("YAML");
        }
        result
    }

    #[test]
    fn scalars_are_read_as_the_field_asks() {
        let read = sample(
            "name: 80\nnumber: 0x10\nflag: yes\nother: {deep: [1, 2]}\nlist:\n- name: ~\n- name: '~'\n",
        );
        let read = read.expect("fits");
        assert_eq!(read.name.as_deref(), Some("80"));
        assert_eq!((read.number, read.flag), (Some(16), Some(true)));
        let names: Vec<_> = read
            .list
            .unwrap_or_default()
            .into_iter()
            .map(|item| item.name)
            .collect();
        assert_eq!(names, [None, Some("~".to_owned())]);
        let huge = sample("number: 99999999999999999999\n").expect("fits");
        assert_eq!(huge.number, Some(i64::MAX));
    }

    #[test]
    fn a_misfit_is_told_with_its_path_and_place() {
        for (text, place, message) in [
            (
                "list:\n- name: a\n- number: eighty\n",
                (3, 11),
                "list[1].number: invalid type: string \"eighty\", expected i64",
            ),
            (
                "name: a\nlist: none\n",
                (2, 7),
                "list: invalid type: string \"none\", expected a sequence",
            ),
            (
                "number: '8'\n",
                (1, 9),
                "number: invalid type: string \"8\", expected i64",
            ),
        ] {
            let fault = sample(text).expect_err("does not fit");
            let at = fault.at.map(|at| (at.line, at.column));
            assert_eq!((at, fault.to_string().as_str()), (Some(place), message));
        }
    }

    #[test]
    fn anchors_aliases_and_merges_are_followed() {
        let read =
            sample("base: &base {name: shared, number: 1}\n<<: *base\nnumber: 2\nlist: [*base]\n")
                .expect("fits");
        assert_eq!(
            (read.name.as_deref(), read.number),
            (Some("shared"), Some(2))
        );
        let first = read.list.unwrap_or_default().pop().expect("one item");
        assert_eq!(
            (first.name.as_deref(), first.number),
            (Some("shared"), Some(1))
        );
    }

    /// Lines that each refer many times to the line before.
    fn bomb(lines: usize, references: impl Fn(usize) -> String) -> String {
        let line = |n: usize| match n {
            0 => "a0: &a0 {name: x}\n".to_owned(),
            _ => format!("a{n}: &a{n} {}\n", references(n - 1)),
        };
        (0..lines).map(line).collect()
    }

    #[test]
    fn aliases_stand_for_so_much_and_nest_so_deep_and_no_more() {
        let laughs = |n: usize| format!("[{}]", vec![format!("*a{n}"); 10].join(", "));
        let merges = |n: usize| format!("{{<<: *a{n}, k{n}: x}}");
        let chain = |n: usize| format!("[*a{n}]");
        // Each anchor is used once, so that the chain is the one thing too much.
        for (text, message) in [
            (bomb(12, laughs), "stand for more than 16 MiB"),
            (bomb(5_000, merges), "stand for more than 16 MiB"),
            (bomb(100_000, chain), "nest more than 1000 deep"),
        ] {
            let (seen, faults) = documents(&text);
            assert_eq!(seen, Vec::<String>::new());
            assert!(faults[0].message.contains(message), "{faults:?}");
        }
        for text in [bomb(5, laughs), bomb(500, merges), bomb(900, chain)] {
            let (seen, faults) = documents(&text);
            assert!(faults.is_empty() && seen.len() == 1, "{faults:?}");
        }
        let pods: String = (0..20_000).map(|_| "- *pod\n").collect();
        let text = format!("base: &pod {{name: a}}\nlist:\n{pods}");
        let list = sample(&text).expect("fits").list.expect("a list");
        assert_eq!(list.len(), 20_000);
    }

    #[test]
    fn the_own_entry_comes_before_that_of_a_base_and_the_first_base_before_others() {
        let read = sample(
            "a: &a {name: a, number: 1}\nb: &b {name: b, number: 2, flag: yes}\n\
             <<: [*a, *b]\nname: own\n",
        );
        let read = read.expect("fits");
        assert_eq!(read.name.as_deref(), Some("own"));
        assert_eq!((read.number, read.flag), (Some(1), Some(true)));
    }
}
