use std::fs;
use std::os::unix::fs::symlink;
use std::sync::Arc;

use tempfile::NamedTempFile;
use tokio::task::JoinHandle;
use tracing::subscriber::DefaultGuard;

use super::*;

const HEAD: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";

/// A file that is followed.
struct Followed {
    directory: tempfile::TempDir,
    stop: watch::Sender<bool>,
    task: JoinHandle<Result<Ended, Error>>,
}

impl Followed {
    /// Follows what `write` puts into a directory, by the name that it returns.
    fn start(write: impl FnOnce(&Path) -> PathBuf) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let path = write(directory.path());
        let known = File::read(&path).expect("a configuration");
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(follow(path, known, stopped));
        Self {
            directory,
            stop,
            task,
        }
    }

    async fn changed(self) {
        let ended = tokio::time::timeout(Duration::from_secs(120), self.task);
        let ended = ended.await.expect("the change is noticed");
        assert_eq!(ended.expect("no panic").expect("inotify"), Ended::Changed);
    }
}

fn content(more: &str) -> String {
    format!("{HEAD}{more}\n")
}

fn plain_file(directory: &Path) -> PathBuf {
    let path = directory.join("config.conf");
    fs::write(&path, content("")).expect("a file");
    path
}

/// As Kubernetes mounts a ConfigMap.
fn mounted(directory: &Path) -> PathBuf {
    let data = directory.join("..2026_1");
    fs::create_dir(&data).expect("a directory");
    fs::write(data.join("config.conf"), content("")).expect("a file");
    symlink("..2026_1", directory.join("..data")).expect("a link");
    symlink("..data/config.conf", directory.join("config.conf")).expect("a link");
    directory.join("config.conf")
}

/// As Kubernetes changes a mounted ConfigMap.
fn swap(directory: &Path, version: &str, text: &str) {
    let data = directory.join(version);
    fs::create_dir(&data).expect("a directory");
    fs::write(data.join("config.conf"), text).expect("a file");
    symlink(version, directory.join("..data_tmp")).expect("a link");
    fs::rename(directory.join("..data_tmp"), directory.join("..data")).expect("a rename");
}

#[tokio::test]
async fn a_file_that_is_written_anew_is_noticed() {
    let followed = Followed::start(plain_file);
    let path = followed.directory.path().join("config.conf");
    fs::write(path, content("clusterCIDR: 10.0.0.0/8")).expect("a file");
    followed.changed().await;
}

#[tokio::test]
async fn a_file_that_is_replaced_is_noticed() {
    let followed = Followed::start(plain_file);
    let path = followed.directory.path().join("config.conf");
    fs::remove_file(&path).expect("it is there");
    tokio::task::yield_now().await;
    let draft = followed.directory.path().join("draft");
    fs::write(&draft, content("clusterCIDR: 10.0.0.0/8")).expect("a file");
    fs::rename(draft, path).expect("a rename");
    followed.changed().await;
}

/// The file of what this thread logs from now on, until the second value goes away.
fn listen() -> (NamedTempFile, DefaultGuard) {
    let file = NamedTempFile::new().expect("a file");
    let writer = Arc::new(file.reopen().expect("the file"));
    let subscriber = tracing_subscriber::fmt().with_writer(writer).finish();
    (file, tracing::subscriber::set_default(subscriber))
}

#[tokio::test]
async fn a_mounted_config_map_is_followed_over_several_changes() {
    let (log, _guard) = listen();
    let followed = Followed::start(mounted);
    let directory = followed.directory.path().to_owned();
    // The same settings in other words, then some that cannot be used.
    swap(&directory, "..2026_2", &content("# nothing new"));
    tokio::task::yield_now().await;
    swap(&directory, "..2026_3", &content("clusterCIDR: 10.0.0.0/33"));
    fs::remove_dir_all(directory.join("..2026_1")).expect("it is there");
    let told = tokio::time::timeout(Duration::from_secs(120), async {
        let logged = || fs::read_to_string(log.path()).expect("the log");
        while !logged().contains("10.0.0.0/33") {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    told.await.expect("the fault is told");
    assert!(!followed.task.is_finished(), "the settings in force stay");
    swap(&directory, "..2026_4", &content("clusterCIDR: 10.0.0.0/8"));
    followed.changed().await;
}

#[tokio::test]
async fn a_link_to_a_file_elsewhere_is_followed() {
    let elsewhere = tempfile::tempdir().expect("a directory");
    let target = plain_file(elsewhere.path());
    let followed = Followed::start(|directory| {
        let path = directory.join("link");
        symlink(&target, &path).expect("a link");
        path
    });
    fs::write(&target, content("clusterCIDR: 10.0.0.0/8")).expect("a file");
    followed.changed().await;
}

#[tokio::test]
async fn the_shutdown_ends_it() {
    let followed = Followed::start(plain_file);
    followed.stop.send(true).expect("a receiver exists");
    let ended = tokio::time::timeout(Duration::from_secs(120), followed.task);
    let ended = ended.await.expect("it ends").expect("no panic");
    assert_eq!(ended.expect("inotify"), Ended::Stopped);
}
