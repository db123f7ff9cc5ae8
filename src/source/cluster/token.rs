//! Bearer tokens.
//!
//! `kube` sends the content of a token file unchanged, and panics on an inline token that is not
//! valid in a header. A file often ends with a line break; as with client-go, white space around a
//! token is removed.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hyper::Request;
use hyper::header::{AUTHORIZATION, HeaderValue};
use kube::Config;
use kube::client::Body;
use kube::config::AuthInfo;
use secrecy::ExposeSecret;

use super::Error;

/// How often a file is read again. Its token may be valid for only a few minutes.
const AGAIN: Duration = Duration::from_secs(50);

/// Checks the tokens written in a kubeconfig. As with client-go, an empty one is ignored.
///
/// # Errors
/// If a token is not valid in a header.
pub(super) fn check_inline(auth: &mut AuthInfo, kubeconfig: &Path) -> Result<(), Error> {
    auth.token = auth
        .token
        .take()
        .filter(|token| !token.expose_secret().is_empty());
    let own = auth
        .token
        .as_ref()
        .map(|token| ("token", token.expose_secret()));
    let provider = auth
        .auth_provider
        .iter()
        .flat_map(|provider| &provider.config);
    let provided = provider.filter(|(name, _)| ["id-token", "access-token"].contains(&&***name));
    let provided = provided.map(|(name, token)| (&**name, &**token));
    for (name, token) in own.into_iter().chain(provided) {
        header(token).map_err(|reason| Error::Token {
            place: format!("`{name}` of the user in {}", kubeconfig.display()),
            reason: reason.to_owned(),
        })?;
    }
    Ok(())
}

/// A token file of a configuration, and its last valid token.
#[derive(Clone)]
pub(super) struct TokenFile {
    path: PathBuf,
    header: HeaderValue,
    read: Instant,
}

impl TokenFile {
    /// Takes the token file out of a configuration, unless other credentials in it have precedence.
    ///
    /// # Errors
    /// If the file cannot be read, or its token is not valid in a header.
    pub(super) fn take(config: &mut Config) -> Result<Option<Self>, Error> {
        let auth = &mut config.auth_info;
        let has_password = auth.username.is_some() && auth.password.is_some();
        if auth.auth_provider.is_some() || has_password || auth.token.is_some() {
            return Ok(None);
        }
        let Some(path) = auth.token_file.take().map(PathBuf::from) else {
            return Ok(None);
        };
        let header = read(&path).map_err(|reason| Error::Token {
            place: path.display().to_string(),
            reason,
        })?;
        let read = Instant::now();
        Ok(Some(Self { path, header, read }))
    }

    /// Adds the token to a request. If the file has no valid token, as while it is being replaced,
    /// the last one stays in use.
    pub(super) fn sign(&mut self, mut request: Request<Body>) -> Request<Body> {
        if self.read.elapsed() >= AGAIN {
            self.read = Instant::now();
            match read(&self.path) {
                Ok(header) => self.header = header,
                Err(reason) => tracing::warn!(
                    "cannot use the token in {}: {reason}; the last one stays in use",
                    self.path.display()
                ),
            }
        }
        let headers = request.headers_mut();
        headers.insert(AUTHORIZATION, self.header.clone());
        request
    }
}

fn read(path: &Path) -> Result<HeaderValue, String> {
    let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
    header(text.trim()).map_err(str::to_owned)
}

fn header(token: &str) -> Result<HeaderValue, &'static str> {
    if token.is_empty() {
        return Err("it is empty");
    }
    let mut header = HeaderValue::try_from(format!("Bearer {token}"))
        .map_err(|_| "it contains a line break or another control character")?;
    header.set_sensitive(true);
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_replaced_is_read_again_and_a_broken_one_changes_nothing() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("token");
        let mut config = Config::new("https://192.0.2.1".parse().expect("an address"));
        config.auth_info.token_file = path.to_str().map(str::to_owned);
        fs::write(&path, " \n").expect("written");
        let mut broken = config.clone();
        assert!(TokenFile::take(&mut broken).is_err());
        fs::write(&path, "first\r\n\n").expect("written");
        let mut file = TokenFile::take(&mut config).expect("a token").expect("it");
        assert_eq!(config.auth_info.token_file, None, "kube adds none");
        let mut sent = |content: &str, age: Duration| {
            fs::write(&path, content).expect("written");
            file.read = Instant::now().checked_sub(age).expect("an instant");
            let request = file.sign(Request::new(Body::empty()));
            let header = request.headers().get(AUTHORIZATION).expect("a header");
            assert!(header.is_sensitive());
            header.to_str().expect("ASCII").to_owned()
        };
        assert_eq!(sent("second", Duration::ZERO), "Bearer first");
        assert_eq!(sent("second", AGAIN), "Bearer second");
        for broken in ["", "th\nird", "th\0ird"] {
            assert_eq!(sent(broken, AGAIN), "Bearer second");
        }
        assert_eq!(sent("\tthird\n", AGAIN), "Bearer third");
    }
}
