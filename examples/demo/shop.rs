//! The shop: its manifests, which nftlet watches, and its servers in the pods.

use std::fs;
use std::path::Path;

use crate::Outcome;
use crate::netns::{Lab, Protocol, Server};

/// The pods' servers and the folder of manifests that nftlet watches.
pub struct Shop {
    pub folder: tempfile::TempDir,
    pub servers: Vec<(String, Server)>,
}

impl Shop {
    /// Copies the manifests and starts the servers that they name.
    pub fn open(lab: &Lab) -> Outcome<Self> {
        let folder = tempfile::Builder::new().prefix("nftlet-shop-").tempdir()?;
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/shop");
        let entries = fs::read_dir(&source)
            .map_err(|error| format!("the manifests in {} are missing: {error}", source.display()));
        for entry in entries? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default();
            fs::copy(&path, folder.path().join(name))?;
        }
        let ports = [
            (Protocol::Http, 8080),
            (Protocol::Http, 8081),
            (Protocol::Http, 9091),
            (Protocol::Udp, 5353),
            (Protocol::Tcp, 5353),
        ];
        let servers = lab.pods().into_iter().flat_map(|pod| {
            let all = ports.map(|(protocol, port)| pod.serve(protocol, port));
            all.into_iter()
                .flatten()
                .map(|server| (pod.name.clone(), server))
        });
        Ok(Self {
            servers: servers.collect(),
            folder,
        })
    }

    /// Removes a pod from all slices. Each file is replaced by a rename, so that it is never incomplete.
    pub fn remove_from_manifests(&self, pod: &str) -> Outcome<usize> {
        let mut changed = 0;
        for entry in fs::read_dir(self.folder.path())? {
            let path = entry?.path();
            let before = fs::read_to_string(&path)?;
            let after = without_endpoint(&before, pod);
            if after != before {
                // With this extension, nftlet does not read the unfinished file.
                let draft = path.with_extension("draft");
                fs::write(&draft, after)?;
                fs::rename(&draft, &path)?;
                changed += 1;
            }
        }
        Ok(changed)
    }

    /// Returns the number of requests that the servers of a pod have answered.
    pub fn served(&self, pod: &str) -> u64 {
        let of_pod = self.servers.iter().filter(|(name, _)| name == pod);
        of_pod.map(|(_, server)| server.served()).sum()
    }
}

/// Returns a manifest without the endpoints of one pod.
fn without_endpoint(manifest: &str, pod: &str) -> String {
    let (mut kept, mut item) = (String::new(), None::<String>);
    let last_line = format!("      name: {pod}\n");
    for line in manifest.split_inclusive('\n') {
        if line == "  - addresses:\n" {
            kept.push_str(&item.take().unwrap_or_default());
            item = Some(String::new());
        } else if !line.starts_with("    ") {
            kept.push_str(&item.take().unwrap_or_default());
        }
        match &mut item {
            Some(text) => {
                text.push_str(line);
                if line == last_line {
                    item = None;
                }
            }
            None => kept.push_str(line),
        }
    }
    kept + &item.unwrap_or_default()
}

/// Returns whether a text contains a word that is not part of a longer address.
pub fn has_word(text: &str, word: &str) -> bool {
    let part = |c: char| c.is_ascii_hexdigit() || c == '.' || c == ':';
    text.match_indices(word).any(|(at, _)| {
        let before = text[..at].chars().next_back();
        let after = text[at + word.len()..].chars().next();
        !before.is_some_and(part) && !after.is_some_and(|c| c.is_ascii_hexdigit())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_taken_out_of_a_manifest() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/shop/web.yaml");
        let before = fs::read_to_string(path).expect("the manifest");
        let after = without_endpoint(&before, "pod-3");
        assert_eq!(after.matches("- addresses:").count(), 4);
        assert!(!after.contains("pod-3") && !after.contains("::13"));
        assert_eq!(after.matches("---\n").count(), 2);
        assert_eq!(without_endpoint(&after, "pod-3"), after);
    }

    #[test]
    fn words_are_whole_addresses() {
        assert!(has_word("dnat to 10.244.1.1:80", "10.244.1.1"));
        assert!(!has_word("dnat to 10.244.1.13:80", "10.244.1.1"));
        assert!(!has_word("110.244.1.1", "10.244.1.1"));
    }
}
