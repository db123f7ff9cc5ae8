//! Reading YAML text into [`Node`]s, one document and one list item at a time.
//!
//! A file is first cut at its `---` lines, so that a syntax error spoils one document and not
//! the file. Items of a list are handed out one by one while the document is being read: the
//! output of `kubectl get -o yaml` for a large cluster is a single list, and never has to be in
//! memory as a tree.

use std::borrow::Cow;
use std::collections::HashMap;
use std::rc::Rc;

use serde_saphyr::granit_parser::{
    Event, Marker, Options, Parser, ScalarStyle, ScanError, StrInput,
};

use super::tree::{Node, Position, Value};

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
    };
    loop {
        match reader.next()? {
            (Event::StreamEnd, _) => return Ok(()),
            (Event::MappingStart(_, anchor, _), at) => {
                let entries = reader.root(take)?;
                let node = reader.anchored(anchor, at, Value::Mapping(merged(entries)));
                take(Part::Document(node));
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
    anchors: HashMap<usize, Rc<Node<'a>>>,
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

    fn node(&mut self, event: Event<'a>, at: Position) -> Result<Node<'a>, SyntaxFault> {
        match event {
            Event::Scalar(text, style, anchor, _) => {
                let plain = style == ScalarStyle::Plain;
                Ok(self.anchored(anchor, at, Value::Scalar { text, plain }))
            }
            Event::SequenceStart(_, anchor, _) => {
                let mut items = Vec::new();
                loop {
                    match self.next()? {
                        (Event::SequenceEnd, _) => break,
                        (event, at) => items.push(self.node(event, at)?),
                    }
                }
                Ok(self.anchored(anchor, at, Value::Sequence(items)))
            }
            Event::MappingStart(_, anchor, _) => {
                let mut entries = Vec::new();
                while let Some(key) = self.key()? {
                    let (event, at) = self.next()?;
                    self.entry(&mut entries, key, event, at)?;
                }
                Ok(self.anchored(anchor, at, Value::Mapping(merged(entries))))
            }
            Event::Alias(anchor) => match self.anchors.get(&anchor) {
                Some(node) => Ok(Node {
                    at,
                    value: Value::Shared(node.clone()),
                }),
                None => Err(SyntaxFault {
                    at,
                    message: "an alias cannot refer to the value that contains it".to_owned(),
                }),
            },
            _ => Err(SyntaxFault {
                at,
                message: "the document ends in the middle of a value".to_owned(),
            }),
        }
    }

    fn anchored(&mut self, anchor: usize, at: Position, value: Value<'a>) -> Node<'a> {
        let node = Node { at, value };
        // 0 says that there is no anchor.
        if anchor == 0 {
            return node;
        }
        let shared = Rc::new(node);
        self.anchors.insert(anchor, shared.clone());
        Node {
            at,
            value: Value::Shared(shared),
        }
    }
}

/// Resolves `<<: *base`: the entries of the base that the mapping does not have itself.
fn merged<'a>(mut entries: Vec<(Cow<'a, str>, Node<'a>)>) -> Vec<(Cow<'a, str>, Node<'a>)> {
    while let Some(index) = entries.iter().position(|(key, _)| key == "<<") {
        let (_, base) = entries.remove(index);
        merge(&mut entries, &base);
    }
    entries
}

fn merge<'a>(entries: &mut Vec<(Cow<'a, str>, Node<'a>)>, base: &Node<'a>) {
    match &base.resolved().value {
        Value::Mapping(merged) => {
            for (key, node) in merged {
                if entries.iter().all(|(known, _)| known != key) {
                    let value = match &node.value {
                        Value::Shared(shared) => Value::Shared(shared.clone()),
                        _ => copy(node),
                    };
                    entries.push((key.clone(), Node { at: node.at, value }));
                }
            }
        }
        Value::Sequence(bases) => bases.iter().for_each(|base| merge(entries, base)),
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
}
