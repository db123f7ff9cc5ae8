//! As much of kustomize as the manifests use: resources, components, generated ConfigMaps, patches,
//! labels, namespaces and images. Whatever else a kustomization asks for is an error, and so is a
//! file or the target of a patch that does not exist.
//!
//! The names of generated ConfigMaps get no hash of their content.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// A file `kustomization.yaml`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Kustomization {
    api_version: String,
    kind: String,
    namespace: Option<String>,
    #[serde(default)]
    resources: Vec<String>,
    #[serde(default)]
    components: Vec<String>,
    #[serde(default)]
    labels: Vec<Labels>,
    #[serde(default)]
    images: Vec<Image>,
    #[serde(default)]
    config_map_generator: Vec<Generator>,
    #[serde(default)]
    patches: Vec<Patch>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Labels {
    pairs: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Image {
    name: String,
    new_name: Option<String>,
    new_tag: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Generator {
    name: String,
    namespace: Option<String>,
    #[serde(default)]
    behavior: Behavior,
    #[serde(default)]
    literals: Vec<String>,
    #[serde(default)]
    files: Vec<String>,
    #[serde(default)]
    options: GeneratorOptions,
}

#[derive(Default, Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Behavior {
    #[default]
    Create,
    Merge,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct GeneratorOptions {
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default, rename = "disableNameSuffixHash")]
    _disable_name_suffix_hash: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Patch {
    target: Option<Target>,
    patch: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Target {
    kind: String,
    name: String,
}

/// What was built.
#[derive(Default)]
pub struct Build {
    pub objects: Vec<Value>,
    /// Every file that was read.
    pub files: BTreeSet<PathBuf>,
}

/// Builds the kustomization of a folder.
#[track_caller]
pub fn build(folder: &Path) -> Build {
    let files = RefCell::default();
    let objects = Builder { files: &files }.kustomization(folder, Vec::new(), false);
    Build {
        objects,
        files: files.into_inner(),
    }
}

/// The object of a kind and a name.
#[track_caller]
pub fn object<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let found = objects
        .iter()
        .find(|object| object["kind"] == kind && object["metadata"]["name"] == name);
    found.unwrap_or_else(|| panic!("there is no {kind} {name}"))
}

/// Writes a kustomization into a folder of its own. `../manifests` in it is the repository's.
pub fn beside(text: &str) -> TempDir {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let path = directory.path().canonicalize().expect("it exists");
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).canonicalize();
    let root = root.expect("it exists");
    // kustomize wants relative paths.
    let up = "../".repeat(path.components().count() - 1);
    let root = root.to_str().expect("UTF-8").trim_start_matches('/');
    let text = text.replace("../manifests", &format!("{up}{root}/manifests"));
    fs::write(path.join("kustomization.yaml"), text).expect("written");
    directory
}

struct Builder<'a> {
    files: &'a RefCell<BTreeSet<PathBuf>>,
}

impl Builder<'_> {
    fn read(&self, path: &Path) -> String {
        let path = path
            .canonicalize()
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        self.files.borrow_mut().insert(path);
        text
    }

    /// A kustomization over what is there already: nothing, unless it is a component.
    fn kustomization(&self, folder: &Path, mut objects: Vec<Value>, component: bool) -> Vec<Value> {
        let name = folder.join("kustomization.yaml");
        let this: Kustomization = serde_saphyr::from_str(&self.read(&name))
            .unwrap_or_else(|error| panic!("{}: {error}", name.display()));
        let (version, kind) = if component {
            ("v1alpha1", "Component")
        } else {
            ("v1beta1", "Kustomization")
        };
        let version = format!("kustomize.config.k8s.io/{version}");
        assert_eq!(
            (this.api_version.as_str(), this.kind.as_str()),
            (version.as_str(), kind)
        );

        for resource in &this.resources {
            let path = folder.join(resource);
            if path.is_dir() {
                objects.extend(self.kustomization(&path, Vec::new(), false));
            } else {
                let parsed: Vec<Value> = serde_saphyr::from_multiple(&self.read(&path))
                    .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                objects.extend(parsed);
            }
        }
        for component in &this.components {
            objects = self.kustomization(&folder.join(component), objects, true);
        }
        for generator in &this.config_map_generator {
            self.generate(folder, generator, &mut objects);
        }
        for patch in &this.patches {
            apply(patch, &mut objects);
        }
        for object in &mut objects {
            if let Some(namespace) = this.namespace.as_ref().filter(|_| is_namespaced(object)) {
                object["metadata"]["namespace"] = json!(namespace);
            }
            for labels in &this.labels {
                label(object, &labels.pairs);
            }
            for image in &this.images {
                set_image(object, image);
            }
        }
        objects
    }

    fn generate(&self, folder: &Path, generator: &Generator, objects: &mut Vec<Value>) {
        let mut data = Map::new();
        for literal in &generator.literals {
            let (key, value) = literal.split_once('=').expect("a literal is KEY=VALUE");
            data.insert(key.to_owned(), json!(value));
        }
        for file in &generator.files {
            data.insert(file.clone(), json!(self.read(&folder.join(file))));
        }
        if generator.behavior == Behavior::Merge {
            let target = find(objects, "ConfigMap", &generator.name);
            let [target] = &target[..] else {
                panic!("there is no ConfigMap {} to merge with", generator.name);
            };
            let known = objects[*target]["data"].as_object_mut();
            known.expect("a ConfigMap has data").extend(data);
            return;
        }
        let mut object = json!({"apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": generator.name}, "data": data});
        if let Some(namespace) = &generator.namespace {
            object["metadata"]["namespace"] = json!(namespace);
        }
        label(&mut object, &generator.options.labels);
        objects.push(object);
    }
}

fn find(objects: &[Value], kind: &str, name: &str) -> Vec<usize> {
    let all = objects.iter().enumerate();
    all.filter(|(_, object)| object["kind"] == kind && object["metadata"]["name"] == name)
        .map(|(index, _)| index)
        .collect()
}

/// Applies operations of RFC 6902 to a target, or removes an object.
fn apply(patch: &Patch, objects: &mut Vec<Value>) {
    let parsed: Value = serde_saphyr::from_str(&patch.patch).expect("a patch is YAML");
    match &patch.target {
        Some(target) => {
            let targets = find(objects, &target.kind, &target.name);
            assert!(
                !targets.is_empty(),
                "there is no {} {}",
                target.kind,
                target.name
            );
            let operations: json_patch::Patch =
                serde_json::from_value(parsed).expect("a patch with a target has operations");
            for index in targets {
                json_patch::patch(&mut objects[index], &operations)
                    .unwrap_or_else(|error| panic!("{} {}: {error}", target.kind, target.name));
            }
        }
        None => {
            assert_eq!(
                parsed["$patch"], "delete",
                "a patch without a target deletes"
            );
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let (kind, name) = (text(&parsed["kind"]), text(&parsed["metadata"]["name"]));
            let targets = find(objects, &kind, &name);
            let [target] = targets[..] else {
                panic!("there is no {kind} {name} to delete");
            };
            let removed = objects.remove(target);
            assert_eq!(
                parsed["metadata"]["namespace"],
                removed["metadata"]["namespace"]
            );
        }
    }
}

fn is_namespaced(object: &Value) -> bool {
    let kind = object["kind"].as_str().unwrap_or_default();
    !["ClusterRole", "ClusterRoleBinding"].contains(&kind)
}

fn label(object: &mut Value, labels: &BTreeMap<String, String>) {
    for (key, value) in labels {
        object["metadata"]["labels"][key] = json!(value);
    }
}

/// Renames an image, in all containers of a pod template.
fn set_image(object: &mut Value, image: &Image) {
    for containers in ["containers", "initContainers"] {
        let list = object.pointer_mut(&format!("/spec/template/spec/{containers}"));
        for container in list.and_then(Value::as_array_mut).into_iter().flatten() {
            let Some((name, tag)) = container["image"]
                .as_str()
                .and_then(|it| it.rsplit_once(':'))
            else {
                panic!("an image has a tag");
            };
            if name == image.name {
                let name = image.new_name.as_deref().unwrap_or(name);
                let tag = image.new_tag.as_deref().unwrap_or(tag);
                container["image"] = json!(format!("{name}:{tag}"));
            }
        }
    }
}
