//! Deletes network interfaces: kube-proxy's ipvs mode leaves one behind, with all service addresses.

use std::io;

use super::error::Error;
use super::message::{AttrWriter, begin_message, end_message};
use super::socket::Socket;

/// Index, flags and change mask of the kernel's `struct ifinfomsg`. Zeros select the interface by its
/// name.
const NO_INDEX: [u8; 12] = [0; 12];

/// A socket to the network interfaces of the network namespace in which it was opened.
pub(crate) struct Links {
    socket: Socket,
}

impl Links {
    /// Opens a socket in the current network namespace.
    ///
    /// # Errors
    ///
    /// [`Error::Open`] when the socket cannot be opened.
    pub(crate) fn open() -> Result<Self, Error> {
        let socket = Socket::open_on(mnl::Bus::Route, "network interfaces")?;
        Ok(Self { socket })
    }

    /// Deletes an interface with its addresses. Returns false if it does not exist.
    ///
    /// # Errors
    ///
    /// [`Error::Link`] when the kernel refuses, for example for a physical interface.
    pub(crate) fn delete(&mut self, name: &str) -> Result<bool, Error> {
        let seq = self.socket.reserve_numbers(1);
        let mut bytes = Vec::new();
        let start = begin_message(&mut bytes, libc::RTM_DELLINK, 0, seq, 0);
        bytes.extend_from_slice(&NO_INDEX);
        AttrWriter::new(&mut bytes).string(libc::IFLA_IFNAME, name);
        end_message(&mut bytes, start);
        let what = "the removal of a network interface";
        match self.socket.ask(what, seq, &bytes)? {
            0 => Ok(true),
            libc::ENODEV => Ok(false),
            errno => Err(Error::Link {
                name: name.to_owned(),
                source: io::Error::from_raw_os_error(errno),
            }),
        }
    }
}
