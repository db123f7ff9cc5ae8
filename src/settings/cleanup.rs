//! What `--cleanup` removes.

use std::str::FromStr;

use super::Error;

/// The value of `--cleanup`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cleanup {
    /// Everything that nftlet and kube-proxy ever wrote.
    All,
    /// nftlet's own rules.
    Nftlet,
    /// What kube-proxy wrote.
    KubeProxy,
    /// Nothing: the flag is as good as not there.
    Nothing,
}

impl FromStr for Cleanup {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            // kube-proxy's flag is true or false.
            "all" | "true" => Ok(Self::All),
            "nftlet" => Ok(Self::Nftlet),
            "kube-proxy" => Ok(Self::KubeProxy),
            "false" => Ok(Self::Nothing),
            _ => Err(Error::Cleanup),
        }
    }
}
