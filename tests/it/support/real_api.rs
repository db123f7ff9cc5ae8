//! A real etcd and kube-apiserver on loopback, for tests that run where the environment variable
//! KUBEBUILDER_ASSETS names the directory that has both programs.

use super::skip;

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use kube::api::{DeleteParams, Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::Request;
use kube::{Client, Config};
use serde_json::{Value, json};
use skip::skip;

const TOKEN: &str = "test-token";
/// How long the server may take to start, on a slow machine.
const START: Duration = Duration::from_secs(120);
/// How long to wait before asking a starting server again.
const RETRY: Duration = Duration::from_millis(200);

/// The running programs; they end when it is dropped.
pub struct RealApi {
    port: u16,
    client: Client,
    _programs: [Program; 2],
    _directory: tempfile::TempDir,
}

struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        // Both may have ended by themselves.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl RealApi {
    /// Starts the server, or says loudly why the test is skipped.
    pub async fn start() -> Option<Self> {
        let Some(assets) = std::env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from) else {
            let why = "set KUBEBUILDER_ASSETS to a directory with etcd and kube-apiserver";
            skip("real-apiserver", why);
            return None;
        };
        let directory = tempfile::tempdir().expect("a directory");
        let root = directory.path();
        let [etcd_port, peer_port, port] = free_ports();
        let etcd_url = format!("http://127.0.0.1:{etcd_port}");
        let peer_url = format!("http://127.0.0.1:{peer_port}");
        let etcd = start(
            &assets.join("etcd"),
            root,
            &[
                "--data-dir=etcd".to_owned(),
                "--unsafe-no-fsync".to_owned(),
                format!("--listen-client-urls={etcd_url}"),
                format!("--advertise-client-urls={etcd_url}"),
                format!("--listen-peer-urls={peer_url}"),
                format!("--initial-advertise-peer-urls={peer_url}"),
                format!("--initial-cluster=default={peer_url}"),
            ],
        );
        let key = root.join("service-account.key");
        let made = Command::new("openssl")
            .args(["genrsa", "-out"])
            .arg(&key)
            .arg("2048")
            .stderr(Stdio::null())
            .status()
            .expect("openssl, which makes the service account key, can be run");
        assert!(made.success(), "openssl makes a key");
        std::fs::write(
            root.join("tokens.csv"),
            format!("{TOKEN},test,test,\"system:masters\"\n"),
        )
        .expect("written");
        let server = start(
            &assets.join("kube-apiserver"),
            root,
            &[
                format!("--etcd-servers={etcd_url}"),
                format!("--secure-port={port}"),
                "--bind-address=127.0.0.1".to_owned(),
                // A loopback address is not accepted here, and nothing connects to this one.
                "--advertise-address=192.0.2.1".to_owned(),
                "--cert-dir=certificates".to_owned(),
                "--service-cluster-ip-range=10.0.0.0/16".to_owned(),
                "--authorization-mode=AlwaysAllow".to_owned(),
                "--token-auth-file=tokens.csv".to_owned(),
                "--service-account-issuer=https://127.0.0.1".to_owned(),
                format!("--service-account-key-file={}", key.display()),
                format!("--service-account-signing-key-file={}", key.display()),
                "--disable-admission-plugins=ServiceAccount".to_owned(),
            ],
        );
        let kubeconfig = write_kubeconfig(root, port);
        let kubeconfig = Kubeconfig::read_from(kubeconfig).expect("a kubeconfig");
        let config =
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await;
        let client = Client::try_from(config.expect("a configuration")).expect("a client");
        let api = Self {
            port,
            client,
            _programs: [server, etcd],
            _directory: directory,
        };
        api.apply("/api/v1/namespaces", "shop", &namespace()).await;
        Some(api)
    }

    /// Creates or replaces an object.
    pub async fn put(&self, path: &str, object: Value) {
        let meta = &object["metadata"];
        let name = meta["name"].as_str().expect("a name");
        let path = collection(path, meta["namespace"].as_str());
        self.apply(&path, name, &object).await;
    }

    /// Applies an object; a server that has just started may not be ready for it yet.
    async fn apply(&self, path: &str, name: &str, object: &Value) {
        let params = PatchParams::apply("test").force();
        let attempts = async {
            loop {
                let request = Request::new(path).patch(name, &params, &Patch::Apply(object));
                let answer = self
                    .client
                    .request::<Value>(request.expect("a request"))
                    .await;
                match answer {
                    Ok(_) => return,
                    Err(fault) => eprintln!("{name} is not accepted yet: {fault}"),
                }
                tokio::time::sleep(RETRY).await;
            }
        };
        let applied = tokio::time::timeout(START, attempts).await;
        applied.unwrap_or_else(|_| panic!("{name} was never accepted"));
    }

    /// Deletes an object by `namespace/name`, or `name` of a cluster-scoped one.
    pub async fn delete(&self, path: &str, key: &str) {
        let (namespace, name) = key
            .split_once('/')
            .map_or((None, key), |(space, name)| (Some(space), name));
        let request =
            Request::new(collection(path, namespace)).delete(name, &DeleteParams::default());
        let deleted = self
            .client
            .request::<Value>(request.expect("a request"))
            .await;
        deleted.expect("the object is deleted");
    }

    pub fn write_kubeconfig(&self, directory: &Path) -> PathBuf {
        write_kubeconfig(directory, self.port)
    }
}

fn namespace() -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}})
}

/// The collection of a namespace, from that of all namespaces.
fn collection(path: &str, namespace: Option<&str>) -> String {
    match (namespace, path.rsplit_once('/')) {
        (Some(namespace), Some((version, plural))) => {
            format!("{version}/namespaces/{namespace}/{plural}")
        }
        _ => path.to_owned(),
    }
}

fn write_kubeconfig(directory: &Path, port: u16) -> PathBuf {
    let path = directory.join("kubeconfig");
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: real\n\
         clusters:\n- name: real\n  cluster:\n    server: https://127.0.0.1:{port}\n    insecure-skip-tls-verify: true\n\
         users:\n- name: test\n  user:\n    token: {TOKEN}\n\
         contexts:\n- name: real\n  context:\n    cluster: real\n    user: test\n"
    );
    std::fs::write(&path, text).expect("written");
    path
}

fn start(program: &Path, directory: &Path, arguments: &[String]) -> Program {
    let child = Command::new(program)
        .args(arguments)
        .current_dir(directory)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    match child {
        Ok(child) => Program(child),
        Err(fault) => panic!(
            "KUBEBUILDER_ASSETS is set, but {} cannot be run: {fault}",
            program.display()
        ),
    }
}

/// Free ports that no program gets by chance: the kernel hands out higher ones.
fn free_ports<const N: usize>() -> [u16; N] {
    static NEXT: AtomicU16 = AtomicU16::new(23_000);
    [(); N].map(|()| {
        loop {
            let port = NEXT.fetch_add(1, Ordering::Relaxed);
            if TcpListener::bind(("127.0.0.1", port)).is_ok() {
                return port;
            }
        }
    })
}
