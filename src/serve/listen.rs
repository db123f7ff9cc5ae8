//! Listening on addresses of the node.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use tokio::net::TcpListener;

/// The maximum number of connections that wait to be accepted.
const BACKLOG: i32 = 1024;

/// All addresses of the node, of both families.
const ALL: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);

/// Listens on an address. `::` means all addresses of both families, or of IPv4 on a node without
/// IPv6.
pub(super) fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    listen_by(address, listen_at)
}

fn listen_by<T>(
    address: SocketAddr,
    listen_at: impl Fn(SocketAddr) -> io::Result<T>,
) -> io::Result<T> {
    match listen_at(address) {
        Err(error) if address.ip() == ALL && has_no_ipv6(&error) => {
            listen_at((Ipv4Addr::UNSPECIFIED, address.port()).into())
        }
        result => result,
    }
}

fn has_no_ipv6(error: &io::Error) -> bool {
    let errors = [Errno::AFNOSUPPORT, Errno::ADDRNOTAVAIL];
    errors
        .map(|errno| Some(errno.raw_os_error()))
        .contains(&error.raw_os_error())
}

fn listen_at(address: SocketAddr) -> io::Result<TcpListener> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    // Allows binding while old connections of the port are in TIME_WAIT.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if address.is_ipv6() {
        // Overrides net.ipv6.bindv6only.
        sockopt::set_ipv6_v6only(&socket, false)?;
    }
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    TcpListener::from_std(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers as a kernel without IPv6 does.
    fn without_ipv6(address: SocketAddr) -> io::Result<SocketAddr> {
        match address {
            SocketAddr::V4(_) => Ok(address),
            SocketAddr::V6(_) => Err(Errno::AFNOSUPPORT.into()),
        }
    }

    #[test]
    fn all_addresses_are_those_of_ipv4_where_there_is_no_ipv6() {
        let on = |address: &str| listen_by(address.parse().unwrap(), without_ipv6);
        assert_eq!(
            on("[::]:10256").unwrap(),
            "0.0.0.0:10256".parse::<SocketAddr>().unwrap()
        );
        // Only `::` falls back to IPv4.
        assert!(on("[::1]:10256").is_err());
        let taken = |_| Err::<(), _>(Errno::ADDRINUSE.into());
        let error = listen_by("[::]:10256".parse().unwrap(), taken).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    }

    #[tokio::test]
    async fn all_addresses_are_those_of_both_families() {
        let listener = listen("[::]:0".parse().unwrap()).unwrap();
        let port = listener.local_addr().unwrap().port();
        let client = std::net::TcpStream::connect(("127.0.0.1", port));
        assert!(client.is_ok(), "{client:?}");
    }
}
