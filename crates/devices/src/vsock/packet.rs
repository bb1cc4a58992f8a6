//! The header of a vsock packet (virtio 1.2, 5.10.6).

use kso_wire::guest::{GUEST_CID, StreamKey};

/// Bytes of a header.
pub const HEADER: usize = 44;
/// `VIRTIO_VSOCK_TYPE_STREAM`.
pub const STREAM: u16 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender reads no more.
pub const NO_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender sends no more.
pub const NO_SEND: u32 = 2;

/// `VIRTIO_VSOCK_OP_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Connect.
    Request = 1,
    /// Connected.
    Response = 2,
    /// Refused, or over.
    Reset = 3,
    /// Half or all closed.
    Shutdown = 4,
    /// Payload.
    Data = 5,
    /// Tells credit.
    CreditUpdate = 6,
    /// Asks for credit.
    CreditRequest = 7,
}

impl Op {
    fn from_raw(raw: u16) -> Option<Op> {
        use Op::{CreditRequest, CreditUpdate, Data, Request, Reset, Response, Shutdown};
        let all = [Request, Response, Reset, Shutdown, Data, CreditUpdate, CreditRequest];
        all.into_iter().find(|op| *op as u16 == raw)
    }
}

/// A header's fields, by their names in the specification.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads it.
    #[must_use]
    pub fn parse(bytes: &[u8; HEADER]) -> Header {
        let mut rest = bytes.as_slice();
        // Never short: the widths add up to HEADER.
        let mut take = |width: usize| {
            let (field, after) = rest.split_at_checked(width).unwrap_or((rest, &[]));
            rest = after;
            field.iter().rev().fold(0_u64, |value, byte| value << 8 | u64::from(*byte))
        };
        let src_cid = take(8);
        let dst_cid = take(8);
        let mut word = || take(4) as u32;
        let (src_port, dst_port, len) = (word(), word(), word());
        let (kind, op) = (take(2) as u16, take(2) as u16);
        let mut word = || take(4) as u32;
        let (flags, buf_alloc, fwd_cnt) = (word(), word(), word());
        Header { src_cid, dst_cid, src_port, dst_port, len, kind, op, flags, buf_alloc, fwd_cnt }
    }

    /// Writes it.
    #[must_use]
    pub fn bytes(&self) -> [u8; HEADER] {
        let cids = self.src_cid.to_le_bytes().into_iter().chain(self.dst_cid.to_le_bytes());
        let words = [self.src_port, self.dst_port, self.len].into_iter().flat_map(u32::to_le_bytes);
        let halves = [self.kind, self.op].into_iter().flat_map(u16::to_le_bytes);
        let rest = [self.flags, self.buf_alloc, self.fwd_cnt].into_iter().flat_map(u32::to_le_bytes);
        let mut bytes = [0; HEADER];
        bytes.iter_mut().zip(cids.chain(words).chain(halves).chain(rest)).for_each(|(to, from)| *to = from);
        bytes
    }

    /// The operation, if it is one.
    #[must_use]
    pub fn operation(&self) -> Option<Op> {
        Op::from_raw(self.op)
    }

    /// The stream, as the guest that sent it names it. `None`: the peer's CID is none that the guest could have meant.
    #[must_use]
    pub fn stream(&self) -> Option<StreamKey> {
        let peer_cid = u32::try_from(self.dst_cid).ok()?;
        Some(StreamKey { local_port: self.src_port, peer_cid, peer_port: self.dst_port })
    }

    /// A header of a packet to the guest.
    #[must_use]
    pub fn to_guest(stream: StreamKey, op: Op) -> Header {
        Header {
            src_cid: stream.peer_cid.into(),
            dst_cid: GUEST_CID.into(),
            src_port: stream.peer_port,
            dst_port: stream.local_port,
            kind: STREAM,
            op: op as u16,
            ..Header::default()
        }
    }

    /// The RST that answers this packet.
    #[must_use]
    pub fn reset(&self) -> Header {
        Header {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: Op::Reset as u16,
            ..Header::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As `struct virtio_vsock_hdr` of Linux 6.1 lies in memory.
    #[test]
    fn golden() {
        let header = Header {
            src_cid: 3,
            dst_cid: 0x0102_0304,
            src_port: 0x1122_3344,
            dst_port: 443,
            len: 5,
            kind: 1,
            op: 5,
            flags: 2,
            buf_alloc: 0x40_0000,
            fwd_cnt: 7,
        };
        let bytes = [
            3, 0, 0, 0, 0, 0, 0, 0, 4, 3, 2, 1, 0, 0, 0, 0, 0x44, 0x33, 0x22, 0x11, 0xbb, 1, 0, 0, 5, 0, 0,
            0, 1, 0, 5, 0, 2, 0, 0, 0, 0, 0, 0x40, 0, 7, 0, 0, 0,
        ];
        assert_eq!(header.bytes(), bytes);
        assert_eq!(Header::parse(&bytes), header);
        assert_eq!(header.operation(), Some(Op::Data));
    }

    proptest! {
        #[test]
        fn round_trip(words in proptest::array::uniform11(any::<u32>())) {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let bytes: [u8; HEADER] = bytes.try_into().unwrap_or([0; HEADER]);
            prop_assert_eq!(Header::parse(&bytes).bytes(), bytes);
        }
    }
}
