//! How traffic of pods is told from other traffic (`--detect-local-mode`).

use std::fmt;
use std::str::FromStr;

use ipnet::IpNet;

use super::Error;

/// The kernel's limit, without the byte that ends the name.
pub(super) const LONGEST_INTERFACE_NAME: usize = 15;

/// `--detect-local-mode`, spelled as in kube-proxy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DetectLocalMode {
    /// By the pod network of the cluster.
    #[default]
    ClusterCidr,
    /// By the pod networks of this node.
    NodeCidr,
    /// By the bridge of the pods.
    BridgeInterface,
    /// By the names of the pods' interfaces.
    InterfaceNamePrefix,
}

impl FromStr for DetectLocalMode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text.trim() {
            // An empty text is the default, with kube-proxy too.
            "" | "ClusterCIDR" => Ok(Self::ClusterCidr),
            "NodeCIDR" => Ok(Self::NodeCidr),
            "BridgeInterface" => Ok(Self::BridgeInterface),
            "InterfaceNamePrefix" => Ok(Self::InterfaceNamePrefix),
            _ => Err(Error::DetectLocalMode),
        }
    }
}

impl fmt::Display for DetectLocalMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ClusterCidr => "ClusterCIDR",
            Self::NodeCidr => "NodeCIDR",
            Self::BridgeInterface => "BridgeInterface",
            Self::InterfaceNamePrefix => "InterfaceNamePrefix",
        })
    }
}

/// A mode with what it needs to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DetectLocal {
    /// By these ranges.
    ClusterCidr(Vec<IpNet>),
    /// By the ranges in the Node.
    NodeCidr,
    /// By this bridge.
    BridgeInterface(String),
    /// By this beginning of names.
    InterfaceNamePrefix(String),
}

/// The name of an interface, or the beginning of one; empty for none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterfaceName(pub(super) String);

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for InterfaceName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let name = text.trim();
        // The kernel takes a few more; those would have to be quoted wherever rules are shown.
        let fits = |c: char| c.is_ascii_graphic() && !"/:*\"'`\\".contains(c);
        match name.chars().find(|c| !fits(*c)) {
            Some(wrong) => Err(Error::InterfaceCharacter(wrong)),
            None if name.len() > LONGEST_INTERFACE_NAME => Err(Error::LongInterface(name.len())),
            None => Ok(Self(name.to_owned())),
        }
    }
}
