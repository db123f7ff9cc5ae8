//! Whether NetworkPolicies are enforced.

use std::fmt;
use std::str::FromStr;

use super::Error;

/// The value of `--network-policy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NetworkPolicyMode {
    /// Enforced.
    #[default]
    On,
    /// Neither read nor enforced.
    Off,
}

impl NetworkPolicyMode {
    /// Whether policies are enforced.
    pub fn is_on(self) -> bool {
        self == Self::On
    }
}

impl FromStr for NetworkPolicyMode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "on" => Ok(Self::On),
            "off" => Ok(Self::Off),
            _ => Err(Error::NetworkPolicy),
        }
    }
}

impl fmt::Display for NetworkPolicyMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::On => "on",
            Self::Off => "off",
        })
    }
}
