//! Errors that end a session with the API server.

use serde::Deserialize;

use super::selection::Selection;
use super::traffic::{Unanswered, innermost};

/// The end of the message about a fault.
pub(crate) const KEPT: &str = "the last known state stays in force, and nftlet keeps retrying";

/// Why a session with the server ended.
#[derive(Debug)]
pub(super) enum WatchError {
    /// The receiver of the events was dropped.
    Closed,
    /// The watch ended, which is normal.
    Ended,
    /// The version to resume from is no longer in the server's history.
    Gone,
    /// The version to resume from is ahead of the server, which has lost history, for example
    /// because its etcd was restored from a backup.
    Ahead,
    /// The server does not stream lists.
    NoStreaming,
    /// The server does not know the field of a field selector.
    UnknownField(String),
    /// The server does not have the API.
    Absent(String),
    /// Discovery says that the server does not have the kind, which it need not have.
    NotServed,
    /// The server refuses access: 401, or 403 for one kind.
    Refused { code: u16, message: String },
    /// The server cannot answer now, and may say after how many seconds to retry.
    Busy {
        code: u16,
        message: String,
        retry_after: u32,
    },
    /// Nothing is received, and the liveness check failed.
    Silent,
    /// The answer is not what was requested; holds a description of it.
    Foreign(String),
    /// No server answers.
    Unreachable(String),
    /// The process or the system has no file descriptor for a connection.
    NoDescriptor(String),
}

/// The `Status` object of the API, as an answer or in a watch.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ApiStatus {
    pub code: Option<u16>,
    pub reason: Option<String>,
    pub message: Option<String>,
    pub details: Option<StatusDetails>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct StatusDetails {
    pub retry_after_seconds: Option<u32>,
    pub causes: Option<Vec<StatusCause>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct StatusCause {
    pub reason: Option<String>,
}

impl From<ApiStatus> for WatchError {
    fn from(status: ApiStatus) -> Self {
        let code = status.code.unwrap_or_default();
        let message = shortened(status.message.unwrap_or_default());
        let reason = status.reason.as_deref().unwrap_or_default();
        let details = status.details.unwrap_or_default();
        let causes = details.causes.unwrap_or_default();
        let ahead = causes
            .iter()
            .any(|cause| cause.reason.as_deref() == Some("ResourceVersionTooLarge"));
        match code {
            _ if ahead => WatchError::Ahead,
            _ if code == 410 || matches!(reason, "Expired" | "Gone") => WatchError::Gone,
            400 if blames_a_field(&message) => WatchError::UnknownField(message),
            400 | 422 => WatchError::NoStreaming,
            401 | 403 => WatchError::Refused { code, message },
            404 | 405 => WatchError::Absent(message),
            _ => WatchError::Busy {
                code,
                message,
                retry_after: details.retry_after_seconds.unwrap_or_default(),
            },
        }
    }
}

/// Returns whether the message of a 400 is about a field selector, for which servers have no
/// `reason`. Up to Kubernetes 1.30 it is `"spec.clusterIP" is not a known field selector`, for kinds
/// with selectable fields `field label not supported`.
fn blames_a_field(message: &str) -> bool {
    ["field selector", "field label"]
        .iter()
        .any(|words| message.contains(words))
}

impl From<kube::Error> for WatchError {
    fn from(error: kube::Error) -> Self {
        match &error {
            kube::Error::Service(unanswered) => match unanswered.downcast_ref::<Unanswered>() {
                Some(unanswered) if unanswered.no_descriptor => {
                    WatchError::NoDescriptor(unanswered.to_string())
                }
                // Already a sentence.
                _ => WatchError::Unreachable(unanswered.to_string()),
            },
            _ => WatchError::Unreachable(broken_off(&error)),
        }
    }
}

/// Describes an error while the body of an answer was read.
pub(super) fn broken_off(error: &(dyn std::error::Error + 'static)) -> String {
    format!("an answer broke off: {}", innermost(error))
}

/// Shortens a text of the server for a message.
pub(super) fn shortened(mut text: String) -> String {
    const LONGEST: usize = 1000;
    if let Some((end, _)) = text.char_indices().nth(LONGEST) {
        text.truncate(end);
        text.push_str("...");
    }
    text
}

/// Joins the words of a text into one short line.
pub(super) fn one_line(text: &str) -> String {
    const LONGEST: usize = 200;
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").chars().take(LONGEST).collect()
}

impl WatchError {
    /// Classifies an unsuccessful answer by its status code, the seconds in its header
    /// `Retry-After`, and its body.
    pub(super) fn of_answer(code: u16, retry_after: Option<u32>, body: &[u8]) -> Self {
        // Load balancers and overloaded servers answer with plain text.
        let mut status: ApiStatus = serde_json::from_slice(body).unwrap_or_else(|_| ApiStatus {
            message: Some(one_line(&String::from_utf8_lossy(body))),
            ..ApiStatus::default()
        });
        status.code.get_or_insert(code);
        let details = status.details.get_or_insert_default();
        details.retry_after_seconds = details.retry_after_seconds.or(retry_after);
        status.into()
    }

    /// Returns the sort of fault and a sentence about it, or `None` for what is not reported.
    pub(super) fn describe(&self, selection: &Selection) -> Option<(String, String)> {
        match self {
            WatchError::Closed
            | WatchError::Ended
            | WatchError::Gone
            | WatchError::Ahead
            | WatchError::NotServed => None,
            WatchError::NoStreaming => Some((
                format!("rejected {}", selection.kind.plural()),
                format!(
                    "the API server rejects requests for {}; check that its address is that of a Kubernetes API server; {KEPT}",
                    selection.kind.plural()
                ),
            )),
            WatchError::UnknownField(message) => Some((
                format!("rejected {}", selection.kind.plural()),
                format!(
                    "the API server cannot select {} by field ({message}); check that its address is that of a Kubernetes API server; {KEPT}",
                    selection.kind.plural()
                ),
            )),
            WatchError::Absent(message) => Some((
                format!("absent {}", selection.kind.plural()),
                format!(
                    "the API server has no {} at {} ({message}); check that its address is that of a Kubernetes API server; {KEPT}",
                    selection.kind.plural(),
                    selection.path
                ),
            )),
            WatchError::Refused { code: 401, message } => Some((
                "401".to_owned(),
                format!(
                    "the API server does not accept nftlet's credentials ({message}); renew the token or client certificate of the service account or of the kubeconfig; {KEPT}"
                ),
            )),
            WatchError::Refused { message, .. } => {
                let discovery = selection
                    .discovery
                    .as_ref()
                    .map_or_else(String::new, |path| {
                        format!(", and {{nonResourceURLs: [\"{path}\"], verbs: [\"get\"]}}")
                    });
                Some((
                    format!("403 {}", selection.kind.plural()),
                    format!(
                        "the API server refuses access: {message}; add to nftlet's ClusterRole the rule {{apiGroups: [\"{}\"], resources: [\"{}\"], verbs: [\"list\", \"watch\"]}}{discovery}; {KEPT}",
                        selection.kind.group(),
                        selection.kind.plural()
                    ),
                ))
            }
            WatchError::Busy { code, message, .. } => Some((
                "busy".to_owned(),
                format!("the API server cannot answer now ({code}: {message}); {KEPT}"),
            )),
            WatchError::Silent => {
                WatchError::Unreachable("it no longer answers".to_owned()).describe(selection)
            }
            WatchError::Foreign(what) => Some((
                format!("foreign {}", selection.kind.plural()),
                format!(
                    "the API server was asked for {} at {}, and the answer is {what}; check what answers at its address, such as a proxy or a load balancer; {KEPT}",
                    selection.kind.plural(),
                    selection.path
                ),
            )),
            WatchError::NoDescriptor(cause) => Some((
                "descriptors".to_owned(),
                format!(
                    "no file descriptor is left for a connection to the API server: {cause}; raise the hard limit of open files (LimitNOFILE= of the container runtime); {KEPT}"
                ),
            )),
            WatchError::Unreachable(cause) => Some((
                "unreachable".to_owned(),
                format!(
                    "the API server cannot be reached: {cause}; check its address and the network; {KEPT}"
                ),
            )),
        }
    }

    /// Returns whether the error is reported at once. Others are reported after a second failed
    /// attempt, since servers restart.
    pub(super) fn is_certain(&self) -> bool {
        matches!(
            self,
            WatchError::Refused { .. }
                | WatchError::Absent(_)
                | WatchError::Foreign(_)
                | WatchError::Silent
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(code: u16) -> WatchError {
        WatchError::from(ApiStatus {
            code: Some(code),
            ..ApiStatus::default()
        })
    }

    #[test]
    fn codes_mean_what_the_api_conventions_say() {
        assert!(matches!(fault(410), WatchError::Gone));
        assert!(matches!(fault(422), WatchError::NoStreaming));
        assert!(matches!(fault(400), WatchError::NoStreaming));
        for message in [
            r#"\"spec.clusterIP\" is not a known field selector: only \"metadata.name\", \"metadata.namespace\""#,
            "field label not supported: spec.clusterIP",
        ] {
            let status = format!(r#"{{"code": 400, "message": "{message}"}}"#);
            let status: ApiStatus = serde_json::from_str(&status).expect("a status");
            assert!(matches!(
                WatchError::from(status),
                WatchError::UnknownField(_)
            ));
        }
        assert!(matches!(fault(401), WatchError::Refused { code: 401, .. }));
        assert!(matches!(fault(403), WatchError::Refused { code: 403, .. }));
        assert!(matches!(fault(404), WatchError::Absent(_)));
        assert!(matches!(fault(500), WatchError::Busy { code: 500, .. }));
        let ahead = r#"{"code": 504, "details": {"causes": [{"reason": "ResourceVersionTooLarge"}], "retryAfterSeconds": 1}}"#;
        let status: ApiStatus = serde_json::from_str(ahead).expect("a status");
        assert!(matches!(WatchError::from(status), WatchError::Ahead));
        let busy = r#"{"code": 429, "details": {"retryAfterSeconds": 7}}"#;
        let status: ApiStatus = serde_json::from_str(busy).expect("a status");
        assert!(matches!(
            WatchError::from(status),
            WatchError::Busy { retry_after: 7, .. }
        ));
    }

    #[test]
    fn a_lack_of_descriptors_is_not_the_fault_of_the_server() {
        let caused_by = |errno| {
            let cause = std::io::Error::from_raw_os_error(errno);
            let around = std::io::Error::other(cause);
            let unanswered = Unanswered::new(&around, "https://192.0.2.1:6443");
            WatchError::from(kube::Error::Service(Box::new(unanswered)))
        };
        for errno in [libc::EMFILE, libc::ENFILE] {
            assert!(matches!(caused_by(errno), WatchError::NoDescriptor(_)));
        }
        let refused = caused_by(libc::ECONNREFUSED);
        assert!(matches!(refused, WatchError::Unreachable(_)));
    }

    #[test]
    fn answers_need_not_be_objects_of_the_api() {
        let busy = WatchError::of_answer(
            429,
            Some(1),
            b"Too many requests,\n  please try again later.\n",
        );
        assert!(
            matches!(&busy, WatchError::Busy { code: 429, message, retry_after: 1 }
                if message == "Too many requests, please try again later."),
            "{busy:?}"
        );
        let page = format!("<html>{}</html>", "<br>\n".repeat(1000));
        let busy = WatchError::of_answer(503, None, page.as_bytes());
        assert!(
            matches!(&busy, WatchError::Busy { code: 503, message, retry_after: 0 }
                if message.starts_with("<html><br> <br>") && message.len() == 200),
            "{busy:?}"
        );
        // The object has precedence over the header.
        let status = br#"{"kind": "Status", "code": 503, "details": {"retryAfterSeconds": 7}}"#;
        let busy = WatchError::of_answer(500, Some(1), status);
        assert!(
            matches!(
                busy,
                WatchError::Busy {
                    code: 503,
                    retry_after: 7,
                    ..
                }
            ),
            "{busy:?}"
        );
        assert!(matches!(
            WatchError::of_answer(404, None, b""),
            WatchError::Absent(_)
        ));
    }
}
