//! HTTP answers in the form of the Kubernetes API.

use std::collections::BTreeMap;
use std::io;
use std::sync::Mutex;

use futures::stream::{self, StreamExt};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame};
use hyper::{Response, StatusCode};
use serde_json::{Value, json};

pub type Answer = Response<BoxBody<Bytes, io::Error>>;

pub fn event(type_: &str, object: &[u8]) -> Bytes {
    let mut line = Vec::with_capacity(object.len() + 40);
    line.extend_from_slice(b"{\"type\":\"");
    line.extend_from_slice(type_.as_bytes());
    line.extend_from_slice(b"\",\"object\":");
    line.extend_from_slice(object);
    line.extend_from_slice(b"}\n");
    Bytes::from(line)
}

pub fn status_value(code: u16, reason: &str, message: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code})
}

pub fn status(code: u16, reason: &str, message: &str) -> Answer {
    let code = StatusCode::from_u16(code).expect("a status code");
    let body = status_value(code.as_u16(), reason, message).to_string();
    full(code, Bytes::from(body))
}

pub fn full(code: StatusCode, body: Bytes) -> Answer {
    let body = Full::new(body).map_err(|never| match never {}).boxed();
    response(code, body)
}

pub fn stream_answer(lines: stream::BoxStream<'static, io::Result<Bytes>>) -> Answer {
    let frames = lines.map(|line| line.map(Frame::data));
    response(
        StatusCode::OK,
        BodyExt::boxed(StreamBody::new(SyncStream(Mutex::new(frames.boxed())))),
    )
}

/// `BoxBody` wants a body that can be shared, although it never is.
pub struct SyncStream(Mutex<stream::BoxStream<'static, io::Result<Frame<Bytes>>>>);

impl futures::Stream for SyncStream {
    type Item = io::Result<Frame<Bytes>>;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        self.0.get_mut().expect("never shared").poll_next_unpin(cx)
    }
}

pub fn response(code: StatusCode, body: BoxBody<Bytes, io::Error>) -> Answer {
    Response::builder()
        .status(code)
        .header("content-type", "application/json")
        .body(body)
        .expect("a response")
}

pub fn query_of(query: &str) -> BTreeMap<String, String> {
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    pairs
        .map(|(key, value)| (decode(key), decode(value)))
        .collect()
}

/// Undoes `application/x-www-form-urlencoded`.
pub fn decode(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digits: Vec<u8> = rest.by_ref().take(2).collect();
                let digits = std::str::from_utf8(&digits).expect("hexadecimal digits");
                u8::from_str_radix(digits, 16).expect("hexadecimal digits")
            }
            other => other,
        });
    }
    String::from_utf8(bytes).expect("UTF-8")
}
