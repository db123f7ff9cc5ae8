//! Names of namespaced and cluster-scoped objects.

use std::fmt;
use std::sync::Arc;

use serde::{Serialize, Serializer};

/// The namespace and name of a Kubernetes object, cheap to clone and compare.
///
/// Printed as `namespace/name`; an object without a namespace is printed as `name`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectName(Arc<str>);

impl ObjectName {
    /// Joins a namespace, empty for a cluster-scoped object, and a name.
    pub fn new(namespace: &str, name: &str) -> Self {
        if namespace.is_empty() {
            Self(Arc::from(name))
        } else {
            Self(Arc::from(format!("{namespace}/{name}")))
        }
    }

    /// Returns the namespace; empty for a cluster-scoped object.
    pub fn namespace(&self) -> &str {
        self.split().0
    }

    /// Returns the name without its namespace.
    pub fn name(&self) -> &str {
        self.split().1
    }

    fn split(&self) -> (&str, &str) {
        // Faster for so short a text than a search for a character.
        let slash = self.0.bytes().position(|byte| byte == b'/');
        let parts = slash.and_then(|at| Some((self.0.get(..at)?, self.0.get(at + 1..)?)));
        parts.unwrap_or(("", &self.0))
    }

    /// Returns the printed form.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for ObjectName {
    /// Serializes the printed form.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl fmt::Debug for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::ObjectName;

    #[test]
    fn splits_into_namespace_and_name() {
        let name = ObjectName::new("shop", "web");
        assert_eq!((name.namespace(), name.name()), ("shop", "web"));
        assert_eq!(name.to_string(), "shop/web");
        let node = ObjectName::new("", "node-1");
        assert_eq!((node.namespace(), node.name()), ("", "node-1"));
        assert_eq!(node.to_string(), "node-1");
    }
}
