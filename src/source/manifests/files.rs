//! Finding and reading the files of the command line's paths.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

/// The longest chain of symbolic links that is followed, as in the kernel.
const MOST_LINKS: usize = 40;

/// Identifies a version of a file's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// Device and inode, which identify a file or directory independently of its path and content.
pub(super) type FileId = (u64, u64);

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.size == 0
    }

    pub(super) fn identity(&self) -> FileId {
        (self.device, self.inode)
    }
}

/// Returns the identity of the file or directory at a path, if it exists.
pub(super) fn identity(path: &Path) -> Option<FileId> {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// The files and directories below the paths of the command line.
#[derive(Debug, Default)]
pub(super) struct Tree {
    /// Manifest files, with the stamps of their content.
    pub files: BTreeMap<PathBuf, Stamp>,
    /// Directories of which all manifests are used.
    pub directories: BTreeSet<PathBuf>,
    /// Single paths that matter: those of the command line, and targets of symbolic links.
    pub exact: BTreeSet<PathBuf>,
    /// Errors below the paths of the command line.
    pub faults: Vec<(PathBuf, io::Error)>,
    /// Paths of the command line that cannot be accessed.
    pub missing: Vec<(PathBuf, io::Error)>,
}

impl Tree {
    /// Walks the paths. Calls `enter` with every directory before it is listed, so that a watch set
    /// by it misses no change.
    pub(super) fn walk(paths: &[PathBuf], enter: &mut dyn FnMut(&Path)) -> Self {
        let mut tree = Self::default();
        let mut seen = HashSet::new();
        for path in paths {
            tree.exact.insert(path.clone());
            enter(parent(path));
            match fs::metadata(path) {
                Ok(metadata) if metadata.is_dir() => {
                    tree.directory(path, &metadata, enter, &mut seen);
                }
                Ok(metadata) => {
                    tree.links(path, enter);
                    tree.files.insert(path.clone(), Stamp::of(&metadata));
                }
                Err(fault) => tree.missing.push((path.clone(), fault)),
            }
        }
        tree
    }

    /// Walks a directory, unless it was seen before, as in a circle of links.
    fn directory(
        &mut self,
        path: &Path,
        metadata: &Metadata,
        enter: &mut dyn FnMut(&Path),
        seen: &mut HashSet<FileId>,
    ) {
        if !seen.insert((metadata.dev(), metadata.ino())) {
            return;
        }
        self.directories.insert(path.to_owned());
        enter(path);
        let entries = match fs::read_dir(path) {
            Ok(entries) => entries,
            Err(fault) => return self.faults.push((path.to_owned(), fault)),
        };
        let entries = entries.filter_map(Result::ok).map(|entry| {
            let is_link = entry.file_type().is_ok_and(|it| it.is_symlink());
            (entry.path(), is_link)
        });
        let mut entries: Vec<_> = entries.filter(|(path, _)| !is_hidden(path)).collect();
        entries.sort();
        for (entry, is_link) in entries {
            match fs::metadata(&entry) {
                Ok(metadata) if metadata.is_dir() => self.directory(&entry, &metadata, enter, seen),
                Ok(metadata) if metadata.is_file() && is_manifest(&entry) => {
                    if is_link {
                        self.links(&entry, enter);
                    }
                    self.files.insert(entry, Stamp::of(&metadata));
                }
                Ok(_) => {}
                // Either removed since the directory was listed, or a link whose target may be
                // created later.
                Err(fault) if fault.kind() == io::ErrorKind::NotFound => self.links(&entry, enter),
                Err(fault) if is_manifest(&entry) => self.faults.push((entry, fault)),
                Err(_) => {}
            }
        }
    }

    /// Adds the targets of a chain of symbolic links, and enters their directories.
    fn links(&mut self, path: &Path, enter: &mut dyn FnMut(&Path)) {
        let mut path = path.to_owned();
        for _ in 0..MOST_LINKS {
            let Ok(target) = fs::read_link(&path) else {
                return;
            };
            path = parent(&path).join(target);
            enter(parent(&path));
            self.exact.insert(path.clone());
        }
    }
}

/// Returns the directory that contains a path; `.` for a bare name.
pub(super) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => path,
    }
}

/// Removes a leading `./`, so that a path equals the one in notifications.
pub(super) fn plain(path: &Path) -> PathBuf {
    let mut components = path.components();
    while components.clone().next() == Some(Component::CurDir) && components.clone().count() > 1 {
        components.next();
    }
    components.as_path().to_owned()
}

/// Returns whether a file is hidden, or a temporary file of an editor.
pub(super) fn is_hidden(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().as_encoded_bytes();
    name.starts_with(b".")
        || name.starts_with(b"#")
        || name.starts_with(b"~")
        || name.ends_with(b"~")
}

/// Returns whether a file of a directory is a manifest, by its extension.
pub(super) fn is_manifest(path: &Path) -> bool {
    path.extension().is_some_and(|extension| {
        ["yaml", "yml", "json"]
            .iter()
            .any(|known| extension == *known)
    })
}

/// Reads a file. Returns its content and stamp.
pub(super) fn read(path: &Path) -> io::Result<(Vec<u8>, Stamp)> {
    let mut file = File::open(path)?;
    let stamp = Stamp::of(&file.metadata()?);
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok((bytes, stamp))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn manifests_are_found_below_directories() {
        let dir = tempfile::tempdir().expect("a directory");
        let root = dir.path();
        fs::create_dir_all(root.join("deep/er")).expect("directories");
        fs::create_dir(root.join(".git")).expect("a directory");
        for name in [
            "a.yaml",
            "b.yml",
            "c.json",
            "deep/er/d.yaml",
            "e.txt",
            ".hidden.yaml",
            "f.yaml~",
            "#g.yaml",
            ".git/h.yaml",
            "noext",
        ] {
            fs::write(root.join(name), "x").expect("a file");
        }
        symlink(root, root.join("deep/circle")).expect("a link");
        symlink("nowhere.yaml", root.join("dangling.yaml")).expect("a link");
        let mut entered = Vec::new();
        let tree = Tree::walk(
            &[root.to_owned(), root.join("e.txt"), root.join("gone")],
            &mut |path| {
                entered.push(path.to_owned());
            },
        );
        let names: Vec<_> = tree
            .files
            .keys()
            .filter_map(|path| path.strip_prefix(root).ok())
            .collect();
        assert_eq!(
            names,
            ["a.yaml", "b.yml", "c.json", "deep/er/d.yaml", "e.txt"].map(Path::new)
        );
        assert_eq!(tree.directories.len(), 3, "{:?}", tree.directories);
        assert!(tree.exact.contains(&root.join("nowhere.yaml")));
        assert!(tree.faults.is_empty(), "{:?}", tree.faults);
        assert_eq!(tree.missing.len(), 1);
        assert!(entered.contains(&root.join("deep/er")));
    }

    #[test]
    fn bare_names_are_in_the_current_directory() {
        assert_eq!(parent(Path::new("a.yaml")), Path::new("."));
        assert_eq!(parent(Path::new("x/a.yaml")), Path::new("x"));
        assert_eq!(plain(Path::new("././a.yaml")), Path::new("a.yaml"));
        assert_eq!(plain(Path::new(".")), Path::new("."));
        assert_eq!(plain(Path::new("/x/a.yaml")), Path::new("/x/a.yaml"));
    }
}
