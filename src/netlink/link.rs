//! Removal of network interfaces.
//!
//! nftlet makes no interfaces. kube-proxy's ipvs mode makes one, which holds all service
//! addresses, and leaves it behind.

use std::io;

use super::attr::Writer;
use super::encode::{begin_message, end_message};
use super::error::Error;
use super::socket::Socket;

/// What follows `ifi_family` and its padding in the kernel's `struct ifinfomsg`: the index, the
/// flags and their mask. Zeros mean that the interface is told by its name.
const NO_INDEX: [u8; 12] = [0; 12];

/// A connection to the kernel's network interfaces, in the network namespace it was opened in.
pub struct Links {
    socket: Socket,
}

impl Links {
    /// Opens a socket in the current network namespace.
    ///
    /// # Errors
    ///
    /// [`Error::Open`] when the socket cannot be opened.
    pub fn open() -> Result<Self, Error> {
        let socket = Socket::open_on(mnl::Bus::Route, "network interfaces")?;
        Ok(Self { socket })
    }

    /// Deletes an interface with its addresses. False if there is none of the name.
    ///
    /// # Errors
    ///
    /// [`Error::Link`] when the kernel refuses, as for a real network card.
    pub fn delete(&mut self, name: &str) -> Result<bool, Error> {
        let seq = self.socket.reserve_numbers(1);
        let mut bytes = Vec::new();
        let start = begin_message(&mut bytes, libc::RTM_DELLINK, 0, seq, 0);
        bytes.extend_from_slice(&NO_INDEX);
        Writer::new(&mut bytes).string(libc::IFLA_IFNAME, name);
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
