//! A client for single objects that limits the length of answers.

use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::Request;
use kube::Client;
use kube::client::Body;
use tower::{BoxError, service_fn};

use super::limits::{MOST_OBJECT, MOST_REFUSAL};

/// Wraps a client: answers that are longer than an object can be are errors.
pub(super) fn bounded(client: &Client) -> Client {
    let namespace = client.default_namespace().to_owned();
    let client = client.clone();
    let send = move |request: Request<Body>| {
        let client = client.clone();
        async move {
            let asked = format!("{} {}", request.method(), request.uri().path());
            let answer = client.send(request).await?;
            let most = match answer.status().is_success() {
                true => MOST_OBJECT,
                false => MOST_REFUSAL,
            };
            let explain = move |error| explain(error, &asked, most);
            let body = |body| Limited::new(body, most).map_err(explain);
            Ok::<_, kube::Error>(answer.map(body))
        }
    };
    Client::new(service_fn(send), namespace)
}

fn explain(error: BoxError, asked: &str, most: usize) -> BoxError {
    match error.downcast::<LengthLimitError>() {
        Ok(_) => format!(
            "the answer to {asked} is longer than {} KiB; check what answers at the address of \
             the API server, such as a proxy or a load balancer",
            most >> 10
        )
        .into(),
        Err(other) => other,
    }
}
