//! The channel between a guest's runner and the broker outside.
//!
//! A guest has no way to pass descriptors. Its streams are AF_VSOCK sockets whose other end is the vsock device
//! beside the broker; what AF_VSOCK cannot say about them goes over one *control stream*, a vsock stream to
//! [`ports::CONTROL`] of the host, in frames of [`crate::frame`].
//!
//! ```text
//!   runner in the guest                               broker
//!     | -- Hello -----------------------------------> |
//!     | <--------------------------- Welcome/Refused  |
//!     | -- Prepare{local_port, ..} -----------------> |   then, on the vsock itself, REQUEST from local_port:
//!     |        (vsock REQUEST)                        |   the device finds what was prepared
//!     | <---------------------- Established | Failed  |   written before RESPONSE or RST
//!     | -- Ask{id, ..} -----------------------------> |   listeners, options and addresses of streams
//!     | <----------------------------- Answered{id}   |
//!     | <------------------------------------- Named  |   before a REQUEST from a peer whose CID is no address
//! ```
//!
//! Order holds: packets of one guest are handled in the order in which it sent them, so what was written to the
//! control stream before a `connect` is known when its REQUEST comes; and the other way, what the device
//! writes to the control stream before RESPONSE, RST or REQUEST is in the guest's buffers before them.

use crate::{Caller, Connect, Errno, Failure, Listen, OptionName, OptionValue, Welcome};
use serde::{Deserialize, Serialize};
use std::net::{Ipv4Addr, SocketAddr};

/// vsock ports of the host (CID 2) that have a meaning. Any other REQUEST to CID 2 is refused.
pub mod ports {
    /// The control stream: frames of [`super::ToHost`] and [`super::ToGuest`].
    pub const CONTROL: u32 = 1;
    /// Packets of the guest's TUN: frames of one packet each, virtio-net header included.
    pub const PACKETS: u32 = 2;
    /// The job: frames of [`crate::job::ToLauncher`] and [`crate::job::ToInit`].
    pub const JOB: u32 = 3;
    /// The program's standard input, raw bytes; or both directions of its terminal.
    pub const STDIN: u32 = 4;
    /// The program's standard output, raw bytes.
    pub const STDOUT: u32 = 5;
    /// The program's standard error, raw bytes.
    pub const STDERR: u32 = 6;
    /// Streams of a guest whose VMM carries CID 2 only: each begins with the 8 bytes of a [`super::Ticket`].
    pub const STREAMS: u32 = 7;
    /// The control stream of a provider that a virtual machine is made for: [`crate::provide`]. The guest listens on its own
    /// port of this number for the streams, which begin with a [`crate::provide::Ticket`].
    pub const PROVIDE: u32 = 8;
}

/// The guest's own CID.
pub const GUEST_CID: u32 = 3;
/// First of the CIDs that are no IPv4 address but stand for one that does not fit (IPv6): 240.0.0.0/4.
pub const FIRST_PSEUDO_CID: u32 = 0xf000_0000;
/// First of those that the broker gives out ([`ToGuest::Named`]); the runner gives out the ones before, for peers of
/// its own connections. What a runner's stands for is told by [`Prepare`].
pub const FIRST_NAMED_CID: u32 = 0xf800_0000;
/// One after the last of them; the CIDs from here on are reserved (`VMADDR_CID_ANY`).
pub const LAST_PSEUDO_CID: u32 = 0xffff_ff00;

/// The CID that carries an address: an IPv4 address is its own; `None` needs a pseudo-CID.
#[must_use]
pub fn cid_of(address: std::net::IpAddr) -> Option<u32> {
    match address.to_canonical() {
        std::net::IpAddr::V4(v4) if (GUEST_CID + 1..FIRST_PSEUDO_CID).contains(&u32::from(v4)) => {
            Some(v4.into())
        }
        _ => None,
    }
}

/// The address that a CID carries, unless it is a pseudo-CID, one of vsock's own (0 to 2) or the guest's own.
#[must_use]
pub fn address_of(cid: u32) -> Option<Ipv4Addr> {
    (GUEST_CID + 1..FIRST_PSEUDO_CID).contains(&cid).then(|| Ipv4Addr::from(cid))
}

/// A stream as the guest's kernel names it (`getsockname` and `getpeername` of the AF_VSOCK socket).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct StreamKey {
    /// The guest's vsock port.
    pub local_port: u32,
    /// The peer's CID.
    pub peer_cid: u32,
    /// The peer's vsock port.
    pub peer_port: u32,
}

/// Names a stream of [`ports::STREAMS`]: its `local_port` of [`Prepare`] in the lower half, any number that makes it
/// unique in the upper. Sent as 8 bytes, little-endian; answered by one byte, 0, once it is connected.
pub type Ticket = u64;

/// What a coming REQUEST from `local_port` means. A REQUEST that was not prepared is a connection to the IPv4
/// address and port that its CID and port are. One that is prepared anew replaces the one before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepare {
    /// The vsock port that the guest's socket is bound to.
    pub local_port: u32,
    /// Who connects.
    pub caller: Caller,
    /// Where to, with the options that were set.
    pub connect: Connect,
}

/// What a runner asks about one of its streams, or has done to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StreamCall {
    /// `getsockname` outside: [`GuestReply::Address`].
    LocalAddress,
    /// `getpeername` outside: [`GuestReply::Address`].
    PeerAddress,
    /// `getsockopt` of a portable option: [`GuestReply::Value`].
    GetOption(OptionName),
    /// `setsockopt` of a portable option: [`GuestReply::Done`].
    SetOption(OptionName, OptionValue),
    /// `TCP_INFO` as the host's Linux has it, cut to so many bytes (at most 1024): [`GuestReply::Bytes`].
    TcpInfo(u16),
    /// Bytes that the peer has not acknowledged (`SIOCOUTQ`): [`GuestReply::Value`].
    OutQueue,
}

/// Longest name of a share, bytes: a tag of virtiofs (virtio 1.2, 5.11.4).
pub const MAX_SHARE: usize = 36;

/// A part of a file of a share, to be sent on a stream without passing the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SendFile {
    /// On which stream. What the guest wrote to it before goes first.
    pub stream: StreamKey,
    /// The tag of the share that the guest has mounted.
    pub share: String,
    /// Which file of it: the number that the file server gave the guest's kernel for it. The guest keeps the file open until
    /// the answer, so that the number means nothing else.
    pub node: u64,
    /// From here on.
    pub offset: u64,
    /// At most so many bytes.
    pub count: u64,
    /// Until all is sent or the file ends. Otherwise as much as there is room for.
    pub waits: bool,
}

/// Something for the broker to do, with an answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GuestRequest {
    /// Listen outside: [`GuestReply::Listening`] or [`GuestReply::StayInside`]. Connections come to the guest's
    /// listener on `vsock_port`, which listens already. Without a backlog it only reserves, as [`Listen`] says.
    Listen {
        /// The listener inside.
        listen: Listen,
        /// Where it accepts in the guest. 0 for a reservation.
        vsock_port: u32,
    },
    /// The guest's listener on this vsock port was closed: [`GuestReply::Done`].
    Unlisten(u32),
    /// As [`crate::Request::Release`]: [`GuestReply::Done`].
    Release(SocketAddr),
    /// See [`StreamCall`].
    Stream(StreamKey, StreamCall),
    /// Send a part of a file: [`GuestReply::Value`], the bytes that were sent; or [`GuestReply::StayInside`]: none were, and the
    /// guest's kernel shall do it. `EOPNOTSUPP`: it need not be asked for again, nothing is sent so here.
    SendFile(SendFile),
    /// Send no more for the request of this name, which is answered then: [`GuestReply::Done`].
    StopSending(StreamKey, u64),
}

/// What came of a [`GuestRequest`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GuestReply {
    /// Done.
    Done,
    /// Not outsourced: the guest's kernel shall do it.
    StayInside,
    /// It listens, or is reserved, at this address outside.
    Listening(SocketAddr),
    /// An address.
    Address(SocketAddr),
    /// A number.
    Value(OptionValue),
    /// Bytes of a structure.
    Bytes(Vec<u8>),
}

/// From the guest's runner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToHost {
    /// First message.
    Hello {
        /// [`crate::VERSION`].
        version: u16,
        /// The guest's TUN takes several UDP datagrams of a flow as one packet (`VIRTIO_NET_HDR_GSO_UDP_L4`, Linux 6.2).
        datagram_segments: bool,
    },
    /// See [`Prepare`].
    Prepare(Prepare),
    /// The program closed a socket whose connection is under way, about which vsock says nothing. The answer, if one
    /// comes all the same, is not waited for.
    Abandon {
        /// The guest's vsock port.
        local_port: u32,
    },
    /// Do this.
    Ask {
        /// Named so; unique among the unanswered.
        id: u64,
        /// Asked by.
        caller: Caller,
        /// What.
        request: GuestRequest,
    },
}

/// To the guest's runner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToGuest {
    /// The session is open.
    Welcome(Welcome),
    /// It is not, and why.
    Refused(String),
    /// A prepared connection is up. Written before RESPONSE.
    Established {
        /// The guest's vsock port.
        local_port: u32,
        /// `getsockname` outside.
        local: SocketAddr,
    },
    /// A prepared connection failed, or was denied. Written before RST.
    Failed {
        /// The guest's vsock port.
        local_port: u32,
        /// Why.
        failure: Failure,
    },
    /// An established stream ended with this error (a reset is RST, which AF_VSOCK shows as EOF). Written before RST.
    Broken {
        /// Which.
        stream: StreamKey,
        /// Why.
        errno: Errno,
    },
    /// A peer whose address its CID does not carry: written before the REQUEST that comes from it.
    Named {
        /// The CID (and, where the VMM gives out ports, the port) as the guest sees them.
        stream: StreamKey,
        /// The true address.
        address: SocketAddr,
    },
    /// What came of a request.
    Answered {
        /// Its name.
        id: u64,
        /// The outcome.
        result: Result<GuestReply, Failure>,
    },
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::frame::{Frames, append};
    use crate::{Connect, Family, Origin, SocketOptions};
    use std::net::IpAddr;

    fn bytes<T: Serialize + crate::codec::Bounded>(message: &T) -> Vec<u8> {
        let mut bytes = Vec::new();
        append(message, &mut bytes).unwrap();
        bytes
    }

    /// What both ends of a mixed pair of versions must agree on.
    #[test]
    fn golden_bytes() {
        assert_eq!(bytes(&ToHost::Hello { version: 1, datagram_segments: true }), [3, 0, 0, 0, 0, 1, 1]);
        assert_eq!(bytes(&ToHost::Abandon { local_port: 300 }), [3, 0, 0, 0, 2, 0xac, 2]);
        let stream = StreamKey { local_port: 1, peer_cid: 2, peer_port: 3 };
        let request = GuestRequest::Stream(stream, StreamCall::OutQueue);
        let ask = ToHost::Ask { id: 5, caller: Caller { pid: 6, program: "a".into() }, request };
        assert_eq!(bytes(&ask), [10, 0, 0, 0, 3, 5, 6, 1, b'a', 3, 1, 2, 3, 5]);
        let send = SendFile { stream, share: "s".into(), node: 4, offset: 5, count: 300, waits: true };
        let ask = |request| ToHost::Ask { id: 5, caller: Caller { pid: 6, program: "a".into() }, request };
        let sent = bytes(&ask(GuestRequest::SendFile(send)));
        assert_eq!(sent, [16, 0, 0, 0, 3, 5, 6, 1, b'a', 4, 1, 2, 3, 1, b's', 4, 5, 0xac, 2, 1]);
        let stop = bytes(&ask(GuestRequest::StopSending(stream, 9)));
        assert_eq!(stop, [10, 0, 0, 0, 3, 5, 6, 1, b'a', 5, 1, 2, 3, 9]);
        let established = ToGuest::Established { local_port: 7, local: "127.0.0.1:80".parse().unwrap() };
        assert_eq!(bytes(&established), [8, 0, 0, 0, 2, 7, 0, 127, 0, 0, 1, 80]);
        let failed = ToGuest::Failed { local_port: 7, failure: Failure::denied(Errno::EPERM) };
        assert_eq!(bytes(&failed), [4, 0, 0, 0, 3, 7, 0, 1]);
    }

    #[test]
    fn a_prepared_connection_survives_the_round_trip() {
        let connect = Connect {
            peer: "[2001:db8::1]:443".parse().unwrap(),
            family: Family::V6,
            local: None,
            options: SocketOptions::default(),
            origin: Origin::Intercepted,
        };
        let message =
            ToHost::Prepare(Prepare { local_port: 0x9000_8000, caller: Caller::default(), connect });
        let mut frames = Frames::default();
        frames.push(&bytes(&message));
        assert_eq!(frames.next_message::<ToHost>().unwrap(), Some(message));
    }

    #[test]
    fn a_cid_carries_what_fits() {
        let cid = |text: &str| cid_of(text.parse::<IpAddr>().unwrap());
        assert_eq!(cid("10.0.0.1"), Some(0x0a00_0001));
        assert_eq!(cid("::ffff:10.0.0.1"), Some(0x0a00_0001));
        for other in ["0.0.0.0", "0.0.0.2", "0.0.0.3", "240.0.0.1", "255.255.255.255", "::1", "2001:db8::1"] {
            assert_eq!(cid(other), None, "{other}");
        }
        assert_eq!(address_of(0x7f00_0001), Some(Ipv4Addr::LOCALHOST));
        assert_eq!(address_of(FIRST_PSEUDO_CID), None);
        assert_eq!(address_of(2), None);
    }
}
