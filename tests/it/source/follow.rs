//! Files that change: editors, renames, mounted ConfigMaps.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use super::manifests::service;
use nftlet::model::{Delivery, Event};
use nftlet::source::Manifests;
use nftlet::source::manifests::Error;
use tokio::sync::{mpsc, watch};

/// Follows a path and collects what comes.
struct Following {
    events: mpsc::Receiver<Delivery>,
    stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<Result<(), Error>>,
}

impl Following {
    fn start(path: &Path) -> Self {
        let mut manifests = Manifests::new(vec![path.to_owned()], "node-1".to_owned());
        manifests.load().expect("the path exists");
        let (sender, events) = mpsc::channel(64);
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(manifests.follow(sender, stopped));
        Self { events, stop, task }
    }

    /// Everything up to and including the first event that `last` accepts, in words.
    async fn until(&mut self, last: &str) -> Vec<String> {
        let mut seen = Vec::new();
        let wait = async {
            while let Some(delivery) = self.events.recv().await {
                seen.push(match delivery.event {
                    Event::Apply(object) => format!("apply {}", object.reference()),
                    Event::Delete(name) => format!("delete {name}"),
                    Event::Notice(notice) => {
                        format!("notice {}: {}", notice.subject, notice.message)
                    }
                    other => format!("{other:?}"),
                });
                if seen.last().is_some_and(|event| event.contains(last)) {
                    return true;
                }
            }
            false
        };
        let found = tokio::time::timeout(Duration::from_secs(120), wait).await;
        assert_eq!(found, Ok(true), "{last:?} never came; seen: {seen:#?}");
        seen
    }

    async fn finish(self) {
        self.stop.send(true).expect("the source is running");
        self.task.await.expect("no panic").expect("no fault");
    }
}

#[tokio::test]
async fn a_change_sends_only_what_differs() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("services.yaml");
    let two = |second: &str| format!("{}---\n{}", service("a", "10.0.0.1"), service("b", second));
    fs::write(&path, two("10.0.0.2")).expect("written");
    let mut following = Following::start(&path);
    fs::write(&path, two("10.0.0.3")).expect("written");
    assert_eq!(following.until("shop/b").await, ["apply Service shop/b"]);
    fs::write(&path, service("b", "10.0.0.3")).expect("written");
    assert_eq!(following.until("shop/a").await, ["delete Service shop/a"]);
    following.finish().await;
}

#[tokio::test]
async fn a_relative_path_is_followed() {
    let dir = tempfile::tempdir().expect("a directory");
    let here = std::env::current_dir().expect("a working directory");
    let up = here.components().skip(1).map(|_| "..");
    let below_root = dir.path().strip_prefix("/").expect("an absolute path");
    let relative = up.collect::<std::path::PathBuf>().join(below_root);
    fs::write(dir.path().join("a.yaml"), service("a", "10.0.0.1")).expect("written");
    let mut following = Following::start(&relative);
    fs::write(dir.path().join("a.yaml"), service("a", "10.0.0.9")).expect("written");
    assert_eq!(following.until("shop/a").await, ["apply Service shop/a"]);
    fs::write(dir.path().join("b.yaml"), service("b", "10.0.0.2")).expect("written");
    assert_eq!(following.until("shop/b").await, ["apply Service shop/b"]);
    following.finish().await;
}

#[tokio::test]
async fn rename_into_place_unlink_and_new_directories_are_noticed() {
    let dir = tempfile::tempdir().expect("a directory");
    let root = dir.path();
    fs::write(root.join("a.yaml"), service("a", "10.0.0.1")).expect("written");
    let mut following = Following::start(root);
    fs::write(root.join(".a.yaml.tmp"), service("a", "10.0.0.9")).expect("written");
    fs::rename(root.join(".a.yaml.tmp"), root.join("a.yaml")).expect("renamed");
    assert_eq!(following.until("shop/a").await, ["apply Service shop/a"]);
    fs::create_dir_all(root.join("new/deeper")).expect("directories");
    fs::write(root.join("new/deeper/b.yaml"), service("b", "10.0.0.2")).expect("written");
    assert_eq!(following.until("shop/b").await, ["apply Service shop/b"]);
    fs::remove_file(root.join("a.yaml")).expect("removed");
    assert_eq!(following.until("shop/a").await, ["delete Service shop/a"]);
    fs::remove_dir_all(root.join("new")).expect("removed");
    assert_eq!(following.until("shop/b").await, ["delete Service shop/b"]);
    // The directory comes back, with a new inode of the same name.
    fs::create_dir_all(root.join("new/deeper")).expect("directories");
    fs::write(root.join("new/deeper/c.yaml"), service("c", "10.0.0.3")).expect("written");
    assert_eq!(following.until("shop/c").await, ["apply Service shop/c"]);
    fs::write(root.join("new/deeper/d.yaml"), service("d", "10.0.0.4")).expect("written");
    assert_eq!(following.until("shop/d").await, ["apply Service shop/d"]);
    following.finish().await;
}

#[tokio::test]
async fn a_file_being_rewritten_never_loses_its_objects() {
    use std::io::Write;
    let dir = tempfile::tempdir().expect("a directory");
    let root = dir.path();
    let path = root.join("a.yaml");
    fs::write(&path, service("a", "10.0.0.1")).expect("written");
    let mut following = Following::start(root);

    // An editor truncates, writes in pieces, and meanwhile something else happens nearby.
    let mut open = fs::File::create(&path).expect("truncated");
    fs::write(root.join("other.yaml"), service("other", "10.0.0.5")).expect("written");
    assert_eq!(
        following.until("shop/other").await,
        ["apply Service shop/other"]
    );
    let text = service("a", "10.0.0.2");
    let (head, tail) = text.split_at(40);
    open.write_all(head.as_bytes()).expect("written");
    open.flush().expect("flushed");
    fs::rename(root.join("other.yaml"), root.join("renamed.yaml")).expect("renamed");
    fs::write(root.join("third.yaml"), service("third", "10.0.0.6")).expect("written");
    assert_eq!(
        following
            .until("shop/third")
            .await
            .last()
            .map(String::as_str),
        Some("apply Service shop/third")
    );
    open.write_all(tail.as_bytes()).expect("written");
    drop(open);
    let seen = following.until("apply Service shop/a").await;
    assert!(
        !seen
            .iter()
            .any(|event| event.contains("delete Service shop/a")),
        "{seen:?}"
    );

    // An empty file is reported, and its last objects stay.
    fs::write(&path, "").expect("emptied");
    let seen = following.until("the file is empty").await;
    assert!(
        !seen.iter().any(|event| event.starts_with("delete")),
        "{seen:?}"
    );
    // A comment is a content: nothing is wanted here.
    fs::write(&path, "# none\n").expect("written");
    assert_eq!(following.until("shop/a").await, ["delete Service shop/a"]);
    following.finish().await;
}

#[tokio::test]
async fn an_editor_that_keeps_a_backup_makes_no_gap() {
    let dir = tempfile::tempdir().expect("a directory");
    let root = dir.path();
    let path = root.join("a.yaml");
    fs::write(&path, service("a", "10.0.0.1")).expect("written");
    let mut following = Following::start(&path);
    fs::rename(&path, root.join("a.yaml~")).expect("renamed");
    fs::write(&path, service("a", "10.0.0.2")).expect("written");
    assert_eq!(following.until("shop/a").await, ["apply Service shop/a"]);
    following.finish().await;
}

#[tokio::test]
async fn what_is_at_fault_keeps_its_last_good_state() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("a.yaml");
    let good = |name: &str| service(name, "10.0.0.1");
    fs::write(&path, format!("{}---\n{}", good("a"), good("b"))).expect("written");
    let mut following = Following::start(dir.path());

    // One object is bad; it stays as it was, the other one changes.
    let bad = good("a").replace("- port: 80", "  port: 80");
    fs::write(&path, format!("{bad}---\n{}", service("b", "10.0.0.2"))).expect("written");
    let seen = following.until("shop/b").await;
    assert_eq!(seen.len(), 2, "{seen:?}");
    assert!(
        seen[0].contains("a.yaml:9:5: Service shop/a: spec.ports"),
        "{seen:?}"
    );
    assert_eq!(seen[1], "apply Service shop/b");

    // The document cannot be parsed, so that it is not known which object it was.
    fs::write(
        &path,
        format!("apiVersion: v1\nkind: [\n---\n{}", service("b", "10.0.0.3")),
    )
    .expect("written");
    let seen = following.until("shop/b").await;
    assert_eq!(seen.len(), 2, "{seen:?}");
    assert!(
        seen[0].contains("the file cannot be parsed here"),
        "{seen:?}"
    );

    // Saved again without a change: the report is not repeated. Corrected: deleted objects go.
    fs::write(
        &path,
        format!("apiVersion: v1\nkind: [\n---\n{}", service("b", "10.0.0.4")),
    )
    .expect("written");
    assert_eq!(following.until("shop/b").await, ["apply Service shop/b"]);
    fs::write(&path, service("b", "10.0.0.4")).expect("written");
    assert_eq!(following.until("shop/a").await, ["delete Service shop/a"]);
    following.finish().await;
}

#[tokio::test]
async fn a_mounted_config_map_is_swapped_at_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let root = dir.path();
    let version = |name: &str, ip: &str| {
        fs::create_dir(root.join(name)).expect("a directory");
        fs::write(root.join(name).join("a.yaml"), service("a", ip)).expect("written");
    };
    version("..v1", "10.0.0.1");
    symlink("..v1", root.join("..data")).expect("a link");
    symlink("..data/a.yaml", root.join("a.yaml")).expect("a link");
    let mut following = Following::start(root);
    version("..v2", "10.0.0.2");
    symlink("..v2", root.join("..data_tmp")).expect("a link");
    fs::rename(root.join("..data_tmp"), root.join("..data")).expect("renamed");
    fs::remove_dir_all(root.join("..v1")).expect("removed");
    assert_eq!(following.until("shop/a").await, ["apply Service shop/a"]);
    following.finish().await;
}

#[tokio::test]
async fn the_second_file_applies_once_the_first_is_deleted() {
    let dir = tempfile::tempdir().expect("a directory");
    fs::write(dir.path().join("a.yaml"), service("web", "10.0.0.1")).expect("written");
    fs::write(dir.path().join("b.yaml"), service("web", "10.0.0.2")).expect("written");
    let mut following = Following::start(dir.path());
    fs::remove_file(dir.path().join("a.yaml")).expect("removed");
    assert_eq!(
        following.until("shop/web").await,
        ["apply Service shop/web"]
    );
    fs::remove_file(dir.path().join("b.yaml")).expect("removed");
    assert_eq!(
        following.until("shop/web").await,
        ["delete Service shop/web"]
    );
    following.finish().await;
}
