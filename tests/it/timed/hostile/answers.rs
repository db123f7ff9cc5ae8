//! An API server, or what stands before it, that answers now and then with something else.

use std::thread;
use std::time::Duration;

use super::neighbour::Neighbour;
use crate::support::agent::wait_for_log;
use nftlet_lab::fake_api::{SERVICES, Streaming};

#[test]
fn lists_of_something_else_take_no_service_away() {
    let Some(neighbour) = Neighbour::new() else {
        return;
    };
    let api = &neighbour.node.api;
    api.set_streaming(Streaming::Rejected);
    let agent = neighbour.node.run();
    let answers = [
        r#"{"kind":"PodList","apiVersion":"v1","metadata":{"resourceVersion":"900"},"items":[]}"#,
        r#"{"kind":"ServiceList","apiVersion":"v1","metadata":{"resourceVersion":"900"}}"#,
        r#"{"type":"DELETED","object":{"kind":"Pod","apiVersion":"v1","metadata":{"namespace":"neighbour","name":"web","resourceVersion":"900"}}}"#,
        "<html>Sign in</html>",
    ];
    neighbour.is_served();
    api.answer_instead(SERVICES, Some(answers[0]));
    api.compact(false);
    api.end_watches();
    wait_for_log(&agent, "the answer is a v1 PodList");
    neighbour.changes_in_time_while(1, |call| {
        api.answer_instead(SERVICES, Some(answers[call % answers.len()]));
        thread::sleep(Duration::from_millis(1));
    });
    api.answer_instead(SERVICES, None);
    wait_for_log(&agent, "the API server answers again");
    neighbour.is_served();
}
