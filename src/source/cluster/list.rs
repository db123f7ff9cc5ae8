//! Reading a list object by object while it arrives.
//!
//! A list of any length is never in memory as a whole. Each object, and the text around the
//! objects, have a maximum size.

use std::pin::Pin;
use std::time::Duration;

use futures::io::{AsyncBufRead, AsyncBufReadExt};
use serde_json::value::RawValue;

use super::frames::ListPage;
use super::limits::{MOST_AROUND, MOST_OBJECT};
use super::watch_error::{ApiStatus, WatchError, broken_off, one_line};
use crate::model::Kind;

/// The body of an answer, read in pieces.
pub(super) type Body = Pin<Box<dyn AsyncBufRead + Send>>;

/// One list of objects, or one page of it.
pub(super) struct List {
    kind: Kind,
    body: Body,
    /// How long to wait for more bytes.
    patience: Duration,
    splitter: Splitter,
    /// Whether the text before the objects was checked.
    is_checked: bool,
}

/// The fields of a list other than its objects.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ListEnd {
    /// The version of the list.
    pub version: String,
    /// The `continue` token of the next page.
    pub token: Option<String>,
    /// The length of the text around the objects.
    pub bytes: usize,
}

impl List {
    pub(super) fn new(kind: Kind, body: Body, patience: Duration) -> Self {
        Self {
            kind,
            body,
            patience,
            splitter: Splitter::default(),
            is_checked: false,
        }
    }

    /// Returns the next object, or `None` after the last one.
    ///
    /// # Errors
    /// If this is not a list of the kind, or it breaks off.
    pub(super) async fn next(&mut self) -> Result<Option<&RawValue>, WatchError> {
        self.splitter.object.clear();
        loop {
            let read = tokio::time::timeout(self.patience, self.body.fill_buf()).await;
            let bytes = match read {
                Ok(Ok(bytes)) => bytes,
                Ok(Err(error)) => return Err(WatchError::Unreachable(broken_off(&error))),
                Err(_) => {
                    let cause =
                        format!("nothing was received for {:?} within a list", self.patience);
                    return Err(WatchError::Unreachable(cause));
                }
            };
            if bytes.is_empty() {
                return Ok(None);
            }
            let (taken, is_object) = self.splitter.take(bytes);
            self.body.consume_unpin(taken);
            self.splitter.check_size()?;
            if is_object {
                break;
            }
        }
        // No object of a list of another kind may be delivered.
        if !self.is_checked {
            self.is_checked = true;
            let end = if self.splitter.in_items { "]}" } else { "}" };
            let head = [&self.splitter.around, end.as_bytes()].concat();
            let page: ListPage<'_> = parse(&head)?;
            page.check(self.kind).map_err(WatchError::Foreign)?;
        }
        parse(&self.splitter.object).map(Some)
    }

    /// Returns the other fields, after the last object.
    ///
    /// # Errors
    /// If this is not a complete list of the kind.
    pub(super) fn end(self) -> Result<ListEnd, WatchError> {
        let text = self.splitter.around;
        let mut page: ListPage<'_> = parse(&text)?;
        if page.kind == "Status"
            && let Ok(status) = serde_json::from_slice::<ApiStatus>(&text)
            && status.code.is_some_and(|code| code >= 400)
        {
            return Err(status.into());
        }
        let version = page.version(self.kind).map_err(WatchError::Foreign)?;
        let token = page.metadata.token.take();
        Ok(ListEnd {
            version,
            token: token.filter(|token| !token.is_empty()),
            bytes: text.len(),
        })
    }
}

fn parse<'a, T: serde::Deserialize<'a>>(text: &'a [u8]) -> Result<T, WatchError> {
    serde_json::from_slice(text).map_err(|error| {
        let begin = one_line(&String::from_utf8_lossy(text.get(..80).unwrap_or(text)));
        WatchError::Foreign(format!("no list of objects: {error}: {begin:?}"))
    })
}

/// Separates the objects of a list from the text around them.
#[derive(Default)]
struct Splitter {
    /// The list without its objects.
    around: Vec<u8>,
    /// The object that is being read.
    object: Vec<u8>,
    depth: u32,
    in_string: bool,
    escaped: bool,
    /// Whether the array `items` of the root is being read.
    in_items: bool,
    /// Whether that array has had an object.
    any: bool,
}

impl Splitter {
    /// Consumes bytes up to the end of the next object. Returns their number, and whether an object
    /// is complete.
    fn take(&mut self, bytes: &[u8]) -> (usize, bool) {
        let mut begin = 0;
        for (at, &byte) in bytes.iter().enumerate() {
            if self.in_string {
                match byte {
                    _ if self.escaped => self.escaped = false,
                    b'\\' => self.escaped = true,
                    b'"' => self.in_string = false,
                    _ => {}
                }
                continue;
            }
            match byte {
                b'"' => self.in_string = true,
                b'{' | b'[' => {
                    self.depth += 1;
                    if byte == b'[' && self.depth == 2 {
                        self.around.extend(&bytes[begin..=at]);
                        begin = at + 1;
                        self.in_items = ends_with_items(&self.around);
                    }
                }
                b',' | b']' if self.in_items && self.depth == 2 => {
                    self.object.extend(&bytes[begin..at]);
                    begin = at;
                    if byte == b']' {
                        self.in_items = false;
                        self.depth = 1;
                    } else {
                        begin += 1;
                    }
                    // The `]` of an empty array ends no object.
                    let is_object =
                        byte == b',' || self.any || !self.object.trim_ascii().is_empty();
                    if is_object {
                        self.any = true;
                        self.around.extend(&bytes[begin..=at]);
                        return (at + 1, true);
                    }
                    self.object.clear();
                }
                b'}' | b']' => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
        }
        let rest = if self.in_items {
            &mut self.object
        } else {
            &mut self.around
        };
        rest.extend(&bytes[begin..]);
        (bytes.len(), false)
    }

    fn check_size(&self) -> Result<(), WatchError> {
        for (text, most, what) in [
            (&self.object, MOST_OBJECT, "an object"),
            (&self.around, MOST_AROUND, "a text around objects"),
        ] {
            if text.len() > most {
                let most = most >> 20;
                return Err(WatchError::Foreign(format!(
                    "{what} of more than {most} MiB"
                )));
            }
        }
        Ok(())
    }
}

/// Returns whether a text ends with the start of the array of the field `items`.
fn ends_with_items(text: &[u8]) -> bool {
    let colon = text.strip_suffix(b"[").map(<[u8]>::trim_ascii_end);
    let key = colon.and_then(|text| text.strip_suffix(b":"));
    let rest = key.and_then(|text| text.trim_ascii_end().strip_suffix(b"\"items\""));
    rest.is_some_and(|rest| !rest.ends_with(b"\\"))
}

#[cfg(test)]
mod tests {
    use std::io;

    use futures::TryStreamExt;
    use futures::stream;

    use super::*;

    /// Reads a list that comes in pieces of a length.
    async fn read(text: &str, piece: usize) -> Result<(Vec<String>, ListEnd), WatchError> {
        let pieces: Vec<io::Result<Vec<u8>>> = text
            .as_bytes()
            .chunks(piece)
            .map(|piece| Ok(piece.to_vec()))
            .collect();
        let body = Box::pin(stream::iter(pieces).into_async_read());
        let mut list = List::new(Kind::Service, body, Duration::from_secs(1));
        let mut objects = Vec::new();
        while let Some(object) = list.next().await? {
            objects.push(object.get().to_owned());
        }
        Ok((objects, list.end()?))
    }

    const HEAD: &str = r#""kind":"ServiceList","apiVersion":"v1","metadata":{"resourceVersion":"5","continue":""}"#;

    #[tokio::test]
    async fn objects_come_one_by_one_however_the_list_is_cut() {
        let none: &[&str] = &[];
        for (text, objects) in [
            (format!("{{{HEAD},\"items\":[]}}"), none),
            (format!("{{{HEAD},\"items\":null}}"), none),
            (format!("{{{HEAD},\"items\" : [ \n ] }}\n"), none),
            (format!("{{{HEAD},\"items\":[{{}}]}}"), &["{}"]),
            (
                format!(
                    r#"{{{HEAD},"items":[{{"a":"],}}{{\\\"[" , "b":[[1,2],{{}}]}} , null,7]}}"#
                ),
                &[r#"{"a":"],}{\\\"[" , "b":[[1,2],{}]}"#, "null", "7"],
            ),
            (
                format!(
                    r#"{{"other":{{"items":[[]]}},"more":[1,[2]],{HEAD},"items":["é"],"x":[3]}}"#
                ),
                &[r#""é""#],
            ),
        ] {
            for piece in [1, 2, 3, 7, 1000] {
                let (found, end) = read(&text, piece).await.expect(&text);
                assert_eq!(found, objects, "{text}");
                assert_eq!((&*end.version, end.token), ("5", None));
            }
        }
    }

    #[tokio::test]
    async fn what_is_no_such_list_is_none() {
        let pods = HEAD.replace("Service", "Pod");
        for (text, expected) in [
            (format!("{{{HEAD},\"items\":[{{}}"), "EOF while parsing"),
            (format!("{{{HEAD},\"items\":[{{}}}}"), "EOF while parsing"),
            (format!("{{{HEAD},\"items\":[{{}},]}}"), "EOF while parsing"),
            (format!("{{{HEAD},\"items\":[,{{}}]}}"), "EOF while parsing"),
            (
                format!("{{{HEAD},\"items\":[{{}}{{}}]}}"),
                "trailing characters",
            ),
            (format!("{{{HEAD},\"items\":[]]}}"), "expected `,` or `}`"),
            (format!("{{{HEAD},\"items\":[]}}x"), "trailing characters"),
            (format!("{{{HEAD},\"x\\\"items\":[{{}}]}}"), "without items"),
            (format!("{{{pods},\"items\":[{{}}]}}"), "a v1 PodList"),
            (format!("{{{pods},\"items\":[]}}"), "a v1 PodList"),
            (
                format!("{{\"items\":[{{}}],{HEAD}}}"),
                "without apiVersion and kind",
            ),
            (
                "<html>[\"items\":[1]]</html>".to_owned(),
                "no list of objects",
            ),
            (String::new(), "EOF while parsing"),
        ] {
            for piece in [1, 1000] {
                match read(&text, piece).await {
                    Err(WatchError::Foreign(what)) => {
                        assert!(what.contains(expected), "{text}: {what}")
                    }
                    other => panic!("{text}: {other:?}"),
                }
            }
        }
    }

    #[tokio::test]
    async fn objects_are_bounded_and_lists_are_not() {
        let large = format!("\"{}\"", "x".repeat(MOST_OBJECT - 2));
        let several = [&*large; 3].join(",");
        let (objects, _) = read(&format!("{{{HEAD},\"items\":[{several}]}}"), 1 << 16)
            .await
            .expect("a list");
        assert_eq!(objects.len(), 3);
        let larger = format!("{{{HEAD},\"items\":[1,{large} ]}}");
        let around = format!("{{\"x\":\"{}", "x".repeat(MOST_AROUND));
        for (text, expected) in [
            (larger, "an object of more than 8 MiB"),
            (around, "a text around objects of more than 1 MiB"),
        ] {
            let fault = read(&text, 1 << 16).await;
            assert!(
                matches!(&fault, Err(WatchError::Foreign(what)) if what == expected),
                "{fault:?}"
            );
        }
    }
}
