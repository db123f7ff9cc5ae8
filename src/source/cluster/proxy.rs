//! Choice of the proxy to the API server.
//!
//! `proxy-url` of the kubeconfig has precedence over the environment, which is read as Go programs
//! do: HTTPS_PROXY (HTTP_PROXY for a server without TLS), unless NO_PROXY matches the server. `kube`
//! compares NO_PROXY with the proxy's own address, so the choice is made here. In a pod without a
//! kubeconfig no proxy is used, since the server has an address of the cluster.

use std::net::IpAddr;

use hyper::Uri;
use ipnet::IpNet;

use super::Error;

/// The supported schemes of proxies.
const SCHEMES: [&str; 3] = ["http", "https", "socks5"];

/// Returns the proxy for a server: `named`, from the kubeconfig, else that of the environment.
///
/// # Errors
/// If the chosen one cannot be used.
pub(super) fn choose(
    named: Option<String>,
    server: &Uri,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<Option<Uri>, Error> {
    let either = |upper: &str| {
        let value = variable(upper).filter(|value| !value.is_empty());
        value.or_else(|| variable(&upper.to_lowercase()).filter(|value| !value.is_empty()))
    };
    if let Some(named) = named {
        return read(&named).map(Some);
    }
    let proxies = match server.scheme_str() {
        Some("http") => "HTTP_PROXY",
        _ => "HTTPS_PROXY",
    };
    let Some(proxy) = either(proxies) else {
        return Ok(None);
    };
    if is_excepted(server, &either("NO_PROXY").unwrap_or_default()) {
        return Ok(None);
    }
    read(&proxy).map(Some)
}

/// Parses the address of a proxy. The default scheme is http.
fn read(text: &str) -> Result<Uri, Error> {
    let with_scheme = match text.contains("://") {
        true => text.to_owned(),
        false => format!("http://{text}"),
    };
    let fault = |reason: String| Error::Proxy {
        proxy: without_password(text).to_owned(),
        reason,
    };
    let uri: Uri = with_scheme
        .parse()
        .map_err(|error: hyper::http::uri::InvalidUri| fault(error.to_string()))?;
    match uri.scheme_str() {
        Some(scheme) if SCHEMES.contains(&scheme) => Ok(uri),
        other => Err(fault(format!(
            "the scheme {} is not supported",
            other.unwrap_or("of this address")
        ))),
    }
}

/// Returns the address of a proxy without user and password.
pub(super) fn without_password(proxy: &str) -> &str {
    match proxy.rsplit_once('@') {
        Some((_, rest)) => rest,
        None => proxy,
    }
}

/// Returns whether a list in the form of NO_PROXY matches a server. Loopback addresses always match.
fn is_excepted(server: &Uri, list: &str) -> bool {
    let host = server.host().unwrap_or_default();
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let ip = host.parse::<IpAddr>().ok();
    if host == "localhost" || ip.is_some_and(|ip| ip.is_loopback()) {
        return true;
    }
    let port = server
        .port_u16()
        .unwrap_or(match server.scheme_str() == Some("http") {
            true => 80,
            false => 443,
        });
    let entries = list.split(',').map(str::trim);
    entries.filter(|entry| !entry.is_empty()).any(|entry| {
        if entry == "*" {
            return true;
        }
        if let Ok(range) = entry.parse::<IpNet>() {
            return ip.is_some_and(|ip| range.contains(&ip));
        }
        let bare = entry.trim_start_matches('[').trim_end_matches(']');
        if let Ok(address) = bare.parse::<IpAddr>() {
            return ip == Some(address);
        }
        let (name, only) = match entry.rsplit_once(':') {
            Some((name, only)) => (name, Some(only)),
            None => (entry, None),
        };
        if only.is_some_and(|only| only != port.to_string()) {
            return false;
        }
        let name = name.trim_start_matches('[').trim_end_matches(']');
        if let Some(ip) = ip {
            return name.parse() == Ok(ip);
        }
        let (host, name) = (host.to_lowercase(), name.to_lowercase());
        // A name matches a domain and all names in it, with a leading dot only the latter.
        let name = name.strip_prefix('*').unwrap_or(&name);
        match name.strip_prefix('.') {
            Some(domain) => is_inside(&host, domain),
            None => host == name || is_inside(&host, name),
        }
    })
}

fn is_inside(host: &str, domain: &str) -> bool {
    let rest = host.strip_suffix(domain);
    rest.is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(named: Option<&str>, server: &str, environment: &[(&str, &str)]) -> Option<String> {
        let variable = |name: &str| {
            let mut known = environment.iter();
            let found = known.find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        let server = server.parse().expect("an address");
        choose(named.map(str::to_owned), &server, variable)
            .expect("a usable proxy")
            .map(|uri| uri.to_string())
    }

    #[test]
    fn the_kubeconfig_comes_before_the_environment() {
        const SERVER: &str = "https://192.0.2.10:6443";
        let both = [("HTTPS_PROXY", "192.0.2.20:3128"), ("NO_PROXY", "*")];
        assert_eq!(chosen(None, SERVER, &[]), None);
        assert_eq!(
            chosen(Some("socks5://192.0.2.21:1080"), SERVER, &both).as_deref(),
            Some("socks5://192.0.2.21:1080/"),
            "whatever NO_PROXY says"
        );
        assert_eq!(chosen(None, SERVER, &both), None);
        assert_eq!(
            chosen(None, SERVER, &both[..1]).as_deref(),
            Some("http://192.0.2.20:3128/")
        );
        let lower = [
            ("HTTPS_PROXY", ""),
            ("https_proxy", "https://proxy.example"),
        ];
        assert_eq!(
            chosen(None, SERVER, &lower).as_deref(),
            Some("https://proxy.example/")
        );
        assert_eq!(chosen(None, "http://192.0.2.10", &lower), None);
        let plain = [("HTTP_PROXY", "http://192.0.2.22:8080")];
        assert_eq!(
            chosen(None, "http://192.0.2.10", &plain).as_deref(),
            Some("http://192.0.2.22:8080/")
        );
        assert_eq!(chosen(None, SERVER, &plain), None);
    }

    #[test]
    fn no_proxy_names_servers_as_for_go_programs() {
        for (server, list, excepted) in [
            ("https://127.0.0.1:6443", "", true),
            ("https://[::1]:6443", "", true),
            ("https://localhost", "", true),
            ("https://192.0.2.10:6443", "", false),
            ("https://192.0.2.10:6443", "192.0.2.1,, 192.0.2.10", true),
            ("https://192.0.2.10:6443", "192.0.2.0/28", true),
            ("https://192.0.2.10:6443", "10.0.0.0/8,.svc,2.10", false),
            ("https://192.0.2.10:6443", "192.0.2.10:6443", true),
            ("https://192.0.2.10:6443", "192.0.2.10:443", false),
            ("https://[2001:db8::1]:6443", "2001:db8::/32", true),
            ("https://[2001:db8::1]:6443", "2001:db8::1", true),
            ("https://[2001:db8::1]:6443", "[2001:db8::1]:6443", true),
            ("https://[2001:db8::1]:6443", "2001:db8::2", false),
            ("https://API.example.org:6443", "example.org", true),
            ("https://example.org", "example.org:443", true),
            ("https://example.org", ".example.org", false),
            ("https://api.example.org", ".example.org,", true),
            ("https://api.example.org", "*.Example.org", true),
            ("https://myexample.org", "example.org,.example.org", false),
        ] {
            let server = server.parse().expect("an address");
            assert_eq!(is_excepted(&server, list), excepted, "{server} in {list}");
        }
    }

    #[test]
    fn a_proxy_that_cannot_be_used_is_named_without_its_password() {
        let server = "https://192.0.2.10".parse().expect("an address");
        for (url, reason) in [
            (
                "ftp://me:secret@192.0.2.20",
                "the scheme ftp is not supported",
            ),
            ("http://me:secret@proxy example", "invalid uri"),
        ] {
            let error = choose(Some(url.to_owned()), &server, |_| None);
            let text = error.expect_err("a fault").to_string();
            assert!(text.contains(reason), "{text}");
            assert!(
                text.contains("write it like") && !text.contains("secret"),
                "{text}"
            );
        }
    }
}
