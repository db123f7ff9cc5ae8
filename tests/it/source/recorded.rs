//! Recorded answers of a real API server.

use std::path::Path;

use crate::support::consumer::{Consumer, hasty};
use nftlet::model::{Kind, Object, Reason};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Answers requests with recorded answers of kube-apiserver 1.36; those named `made-` are written by
/// hand, for what was not recorded.
async fn recorded_server(answers: &'static [(&'static str, &'static str)]) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    match socket.read_u8().await {
                        Ok(byte) => head.push(byte),
                        Err(_) => return,
                    }
                }
                let request = String::from_utf8_lossy(&head).into_owned();
                let matches = |parts: &str| parts.split(' ').all(|part| request.contains(part));
                let Some((_, file)) = answers.iter().find(|(parts, _)| matches(parts)) else {
                    panic!("nothing recorded for {request}");
                };
                let path = Path::new(env!("CARGO_MANIFEST_DIR"))
                    .join("tests/fixtures/apiserver")
                    .join(file);
                let text = std::fs::read_to_string(path)
                    .expect("the fixture")
                    .replace("\r\n", "\n");
                let (head, body) = text.split_once("\n\n").expect("head and body");
                // The recording shows the decoded body: it is neither chunked nor of that length.
                let status = head.lines().next().expect("a status line");
                let answer = format!(
                    "{status}\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n{body}"
                );
                let _ = socket.write_all(answer.as_bytes()).await;
                if request.contains("watch=true") && status.contains("200") {
                    std::future::pending::<()>().await;
                }
            });
        }
    });
    format!("http://{address}")
}

#[tokio::test]
async fn recorded_answers_of_a_real_server_are_understood() {
    let server = recorded_server(&[
        (
            "/api/v1/services sendInitialEvents",
            "watchlist-services.http",
        ),
        ("/api/v1/nodes sendInitialEvents", "forbidden-403.http"),
        ("/endpointslices sendInitialEvents", "bad-token-401.http"),
        ("/servicecidrs", "not-found-404.http"),
    ])
    .await;
    let mut consumer = connect_to(&server).await;
    consumer
        .until("services", |it| it.complete.contains(&Kind::Service))
        .await;
    assert_eq!(
        consumer.names(),
        [
            "Service default/kubernetes",
            "Service lab/svc-00000",
            "Service lab/svc-00001",
            "Service lab/svc-00002",
            "Service shop/db",
            "Service shop/ext",
            "Service shop/web"
        ]
    );
    consumer
        .until("two notices", |it| it.notices.len() == 2)
        .await;
    let told = |text: &str| {
        consumer
            .notices
            .iter()
            .any(|notice| notice.message.contains(text))
    };
    assert!(
        told("refuses access") && told("credentials"),
        "{:?}",
        consumer.notices
    );
    consumer.finish().await;
}

#[tokio::test]
async fn recorded_pages_and_changes_of_a_real_server_are_understood() {
    let server = recorded_server(&[
        ("sendInitialEvents /services", "made-rejected-422.http"),
        (
            "sendInitialEvents /endpointslices",
            "made-rejected-422.http",
        ),
        ("sendInitialEvents /nodes", "made-rejected-422.http"),
        ("sendInitialEvents /servicecidrs", "made-rejected-422.http"),
        ("/endpointslices watch=true", "watch-endpointslices.http"),
        ("watch=true", "made-quiet-watch.http"),
        // The recording stopped after two pages; the last one is empty.
        (
            "/api/v1/services c3ZjLTAwMDAyXH",
            "made-list-services-last.http",
        ),
        ("/api/v1/services continue=", "list-services-page2.http"),
        ("/api/v1/services", "list-services-page1.http"),
        ("/api/v1/nodes", "list-node.http"),
        ("/endpointslices", "list-endpointslices.http"),
        ("/servicecidrs", "list-servicecidrs.http"),
    ])
    .await;
    let mut consumer = connect_to(&server).await;
    consumer.ready().await;
    for name in [
        "Service lab/svc-00000",
        "Service lab/svc-00002",
        "Node node-1",
        "ServiceCIDR kubernetes",
        "EndpointSlice shop/web-abc12",
    ] {
        assert!(
            consumer.objects.contains_key(name),
            "{name} in {:?}",
            consumer.names()
        );
    }
    let second = |it: &Consumer| match it.objects.get("EndpointSlice shop/web-abc12") {
        Some(Object::EndpointSlice(slice)) => slice
            .endpoints
            .last()
            .map(|endpoint| endpoint.address.to_string()),
        _ => None,
    };
    consumer
        .until("the change", |it| {
            second(it).as_deref() == Some("10.244.1.12")
        })
        .await;
    assert_eq!(consumer.notices, Vec::new());
    consumer.finish().await;
}

#[tokio::test]
async fn an_answer_that_is_no_list_is_not_taken_for_an_empty_one() {
    let server = recorded_server(&[
        ("sendInitialEvents", "made-rejected-422.http"),
        ("watch=true", "made-quiet-watch.http"),
        ("", "version.http"),
    ])
    .await;
    let mut consumer = connect_to(&server).await;
    consumer
        .until("a notice", |it| !it.notices.is_empty())
        .await;
    assert!(
        consumer.notices[0]
            .message
            .contains("the answer is an object without apiVersion and kind"),
        "{:?}",
        consumer.notices
    );
    assert!(consumer.complete.is_empty(), "{:?}", consumer.log);
    consumer.finish().await;
}

async fn connect_to(server: &str) -> Consumer {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("kubeconfig");
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{{name: c, cluster: {{server: \"{server}\"}}}}]\n\
         users: [{{name: u, user: {{token: t}}}}]\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n"
    );
    std::fs::write(&path, text).expect("written");
    Consumer::connect(&path, directory, hasty()).await
}

#[tokio::test]
async fn lines_in_other_forms_than_servers_write_are_understood() {
    let server = recorded_server(&[
        (
            "/api/v1/services sendInitialEvents",
            "made-watchlist-services-in-other-forms.http",
        ),
        ("", "not-found-404.http"),
    ])
    .await;
    let mut consumer = connect_to(&server).await;
    consumer
        .until("services", |it| it.complete.contains(&Kind::Service))
        .await;
    let services: Vec<_> = ["escaped", "more", "spaced", "turned"]
        .map(|name| format!("Service shop/{name}"))
        .into();
    assert_eq!(consumer.names(), services);
    for (name, address) in [("escaped", "10.96.0.4"), ("more", "10.96.0.3")] {
        let name = format!("Service shop/{name}");
        let Some(Object::Service(service)) = consumer.objects.get(&name) else {
            panic!("{:?}", consumer.log);
        };
        assert_eq!(service.cluster_ips.len(), 1);
        assert_eq!(service.cluster_ips[0].to_string(), address);
    }
    let told: Vec<_> = consumer
        .notices
        .iter()
        .filter(|notice| notice.reason == Reason::InvalidObject)
        .map(|notice| notice.message.as_str())
        .collect();
    assert_eq!(told.len(), 2, "{told:?}");
    for (told, name) in told.iter().zip(["wrong", "half"]) {
        let begin = format!("Service shop/{name}: the object cannot be decoded: ");
        assert!(told.starts_with(&begin), "{told}");
    }
    let stats = consumer.stats.kind(Kind::Service);
    assert_eq!((stats.events(), stats.undecodable()), (6, 2));
    consumer.finish().await;
}
