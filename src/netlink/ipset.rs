//! Lists and destroys ipsets, which kube-proxy's ipvs mode leaves behind.

use std::io;
use std::path::Path;

use super::error::Error;
use super::message::{AttrReader, AttrWriter, begin_message, end_message};
use super::socket::{DUMP_ATTEMPTS, Dump, DumpStatus, Message, Socket};
use super::uapi;

const SETS: &str = "the ipsets";
/// Exists while the kernel has ipsets, built in or loaded.
const MODULE: &str = "/sys/module/ip_set";

/// A socket to the ipsets of the network namespace in which it was opened.
pub(crate) struct IpSets {
    socket: Socket,
}

impl IpSets {
    /// Opens a socket in the current network namespace; `None` where the kernel has no ipsets.
    ///
    /// Checks for the module first, because the kernel would load it to answer the request.
    ///
    /// # Errors
    ///
    /// [`Error::Open`] when the socket cannot be opened.
    pub(crate) fn open() -> Result<Option<Self>, Error> {
        if !Path::new(MODULE).exists() {
            return Ok(None);
        }
        let socket = Socket::open("ipsets")?;
        Ok(Some(Self { socket }))
    }

    /// Returns the names of all sets.
    ///
    /// # Errors
    ///
    /// [`Error::IpSets`] when the kernel refuses.
    pub(crate) fn names(&mut self) -> Result<Vec<String>, Error> {
        let mut filter = request();
        AttrWriter::new(&mut filter).be32(uapi::IPSET_ATTR_FLAGS, uapi::IPSET_FLAG_LIST_SETNAME);
        let mut names = Vec::new();
        self.list(&filter, &mut names, |message, names| {
            names.extend(
                message
                    .attributes()
                    .string(uapi::IPSET_ATTR_SETNAME)
                    .map(str::to_owned),
            );
        })?;
        Ok(names)
    }

    /// Returns the ports in the elements of a set, sorted and without duplicates.
    ///
    /// # Errors
    ///
    /// [`Error::IpSets`] when the kernel refuses.
    pub(crate) fn ports(&mut self, name: &str) -> Result<Vec<u16>, Error> {
        let mut filter = request();
        AttrWriter::new(&mut filter).string(uapi::IPSET_ATTR_SETNAME, name);
        let mut ports = Vec::new();
        self.list(&filter, &mut ports, |message, ports| {
            let elements = message.attributes().nested(uapi::IPSET_ATTR_ADT);
            let elements = elements.into_iter().flatten();
            ports.extend(
                elements
                    .filter(|(kind, _)| *kind == uapi::IPSET_ATTR_DATA)
                    .filter_map(|(_, element)| {
                        AttrReader::new(element).be16(uapi::IPSET_ATTR_PORT)
                    }),
            );
        })?;
        ports.sort_unstable();
        ports.dedup();
        Ok(ports)
    }

    /// Destroys a set. Returns false if it does not exist.
    ///
    /// # Errors
    ///
    /// [`Error::IpSet`] with EBUSY while a rule uses the set.
    pub(crate) fn destroy(&mut self, name: &str) -> Result<bool, Error> {
        let seq = self.socket.reserve_numbers(1);
        let mut bytes = Vec::new();
        let start = begin_message(&mut bytes, kind(uapi::IPSET_CMD_DESTROY), 0, seq, 0);
        bytes.extend_from_slice(&request());
        AttrWriter::new(&mut bytes).string(uapi::IPSET_ATTR_SETNAME, name);
        end_message(&mut bytes, start);
        let errno = match self.socket.ask("the removal of an ipset", seq, &bytes)? {
            0 => return Ok(true),
            libc::ENOENT => return Ok(false),
            // The C library has no text for this number.
            uapi::IPSET_ERR_BUSY => libc::EBUSY,
            errno => errno,
        };
        Err(Error::IpSet {
            name: name.to_owned(),
            source: io::Error::from_raw_os_error(errno),
        })
    }

    fn list<T>(
        &mut self,
        attributes: &[u8],
        found: &mut Vec<T>,
        mut each: impl FnMut(Message, &mut Vec<T>),
    ) -> Result<(), Error> {
        for _ in 0..DUMP_ATTEMPTS {
            found.clear();
            let dump = Dump {
                what: SETS,
                kind: kind(uapi::IPSET_CMD_LIST),
                family: 0,
                attributes,
            };
            match self.socket.dump(dump, |message| each(message, found)) {
                Ok(DumpStatus::Complete) => return Ok(()),
                Ok(DumpStatus::Interrupted) => {}
                Err(Error::Receive { source, .. }) => return Err(Error::IpSets { source }),
                Err(error) => return Err(error),
            }
        }
        Err(Error::Interrupted {
            what: SETS,
            times: DUMP_ATTEMPTS,
        })
    }
}

fn kind(command: u16) -> u16 {
    (libc::NFNL_SUBSYS_IPSET as u16) << 8 | command
}

/// Returns the attribute that begins every request.
fn request() -> Vec<u8> {
    let mut bytes = Vec::new();
    AttrWriter::new(&mut bytes).bytes(uapi::IPSET_ATTR_PROTOCOL, &[uapi::IPSET_PROTOCOL_MIN]);
    bytes
}
