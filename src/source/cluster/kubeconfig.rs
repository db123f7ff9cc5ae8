//! Reading a kubeconfig.

use std::path::Path;

use kube::Config;
use kube::config::{AuthInfo, Cluster, Context, KubeConfigOptions, Kubeconfig, KubeconfigError};

use super::{Error, address, proxy, token};

/// Returns the configuration of a kubeconfig's current context, and the value of its `proxy-url`.
/// `path` is used in messages.
///
/// # Errors
/// If the kubeconfig cannot be used.
pub(super) async fn read(
    path: &Path,
    kubeconfig: Result<Kubeconfig, KubeconfigError>,
) -> Result<(Config, Option<String>), Error> {
    let fault = |source| Error::Kubeconfig {
        path: path.to_owned(),
        source,
    };
    let mut kubeconfig = kubeconfig.map_err(fault)?;
    let server = server(&kubeconfig);
    let mut proxy = None;
    if let Some(cluster) = cluster(&mut kubeconfig) {
        cluster.server.clone_from(&server);
        proxy = cluster.proxy_url.clone().filter(|url| !url.is_empty());
    }
    let options = KubeConfigOptions::default();
    let mut config = match Config::from_custom_kubeconfig(kubeconfig, &options).await {
        Ok(config) => config,
        // `kube` also reads both from the environment.
        Err(KubeconfigError::ParseNoProxy(source)) => return Err(Error::NoProxy { source }),
        Err(KubeconfigError::ParseProxyUrl(source)) => {
            return Err(Error::Proxy {
                proxy: match &proxy {
                    Some(named) => proxy::without_password(named).to_owned(),
                    None => "in HTTPS_PROXY".to_owned(),
                },
                reason: source.to_string(),
            });
        }
        Err(source) => return Err(fault(source)),
    };
    token::check_inline(&mut config.auth_info, path)?;
    if let Some(server) = server {
        let place = format!("`server` in {}", path.display());
        config.cluster_url = address(&server, place)?;
    }
    Ok((config, proxy))
}

/// Returns the server's address. Without a scheme it gets the one of client-go: https if the
/// kubeconfig has certificates.
fn server(kubeconfig: &Kubeconfig) -> Option<String> {
    let context = context(kubeconfig)?;
    let mut users = kubeconfig.auth_infos.iter();
    let user = users.find(|known| Some(&known.name) == context.user.as_ref());
    let has_certificate = |user: &AuthInfo| {
        user.client_certificate.is_some() || user.client_certificate_data.is_some()
    };
    let mut clusters = kubeconfig.clusters.iter();
    let cluster = clusters.find(|known| known.name == context.cluster)?;
    let cluster = cluster.cluster.as_ref()?;
    let server = cluster.server.clone()?;
    if server.contains("://") {
        return Some(server);
    }
    let tls = cluster.certificate_authority.is_some()
        || cluster.certificate_authority_data.is_some()
        || cluster.insecure_skip_tls_verify == Some(true)
        || user.is_some_and(|user| user.auth_info.as_ref().is_some_and(has_certificate));
    let scheme = if tls { "https" } else { "http" };
    Some(format!("{scheme}://{server}"))
}

fn context(kubeconfig: &Kubeconfig) -> Option<&Context> {
    let current = kubeconfig.current_context.as_deref()?;
    let mut contexts = kubeconfig.contexts.iter();
    let context = contexts.find(|known| known.name == current)?;
    context.context.as_ref()
}

fn cluster(kubeconfig: &mut Kubeconfig) -> Option<&mut Cluster> {
    let name = context(kubeconfig)?.cluster.clone();
    let mut clusters = kubeconfig.clusters.iter_mut();
    let cluster = clusters.find(|known| known.name == name)?;
    cluster.cluster.as_mut()
}
