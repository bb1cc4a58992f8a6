//! Where numbers of nodes and of open files stand in requests.

use crate::abi::{self, IN_HEADER, Opcode};
use crate::request::Operation;

/// What a number is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Number {
    Node,
    /// An open file of the node before it in the request.
    File,
}

/// A number in a request: where, of what, and which the client gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub at: usize,
    pub number: Number,
    pub own: u64,
}

/// All numbers of a request, in their order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Places([Option<Place>; 4]);

/// Of a header: `InHeader::nodeid`.
const NODE: usize = 16;
/// The first field behind the header.
const FIRST: usize = IN_HEADER;

/// Where they stand, by what is asked. `None`: there are none.
fn offsets(opcode: Opcode, operation: &Operation<'_>) -> &'static [(usize, Number)] {
    use Number::{File, Node};
    match opcode {
        Opcode::Lookup
        | Opcode::ReadLink
        | Opcode::SymLink
        | Opcode::MkNod
        | Opcode::MkDir
        | Opcode::Unlink
        | Opcode::RmDir
        | Opcode::Open
        | Opcode::OpenDir
        | Opcode::Create
        | Opcode::TmpFile
        | Opcode::StatFs
        | Opcode::SyncFs
        | Opcode::SetXattr
        | Opcode::GetXattr
        | Opcode::ListXattr
        | Opcode::RemoveXattr
        | Opcode::Access => &[(NODE, Node)],
        Opcode::Rename | Opcode::Rename2 | Opcode::Link => &[(NODE, Node), (FIRST, Node)],
        Opcode::Read
        | Opcode::Write
        | Opcode::ReadDir
        | Opcode::ReadDirPlus
        | Opcode::Release
        | Opcode::ReleaseDir
        | Opcode::Flush
        | Opcode::Fsync
        | Opcode::FsyncDir
        | Opcode::GetLk
        | Opcode::SetLk
        | Opcode::SetLkW
        | Opcode::Ioctl
        | Opcode::Fallocate
        | Opcode::Lseek => &[(NODE, Node), (FIRST, File)],
        Opcode::CopyFileRange | Opcode::CopyFileRange64 => {
            &[(NODE, Node), (FIRST, File), (FIRST + 16, Node), (FIRST + 24, File)]
        }
        // These name an open file only if they say so.
        Opcode::GetAttr | Opcode::StatX | Opcode::SetAttr => {
            let named = match operation {
                Operation::GetAttr(get) => get.getattr_flags & abi::GETATTR_FH != 0,
                Operation::StatX(get) => get.getattr_flags & abi::GETATTR_FH != 0,
                Operation::SetAttr(set) => set.valid & abi::Valid::FH.bits() != 0,
                _ => false,
            };
            if named { &[(NODE, Node), (FIRST + 8, File)] } else { &[(NODE, Node)] }
        }
        Opcode::Forget
        | Opcode::BatchForget
        | Opcode::Init
        | Opcode::Destroy
        | Opcode::Interrupt
        | Opcode::Bmap
        | Opcode::Poll
        | Opcode::NotifyReply
        | Opcode::SetupMapping
        | Opcode::RemoveMapping => &[],
    }
}

impl Places {
    /// Finds them in a request that was read as `operation`.
    pub fn of(request: &[u8], opcode: Opcode, operation: &Operation<'_>) -> Self {
        let mut places = Self::default();
        for (slot, (at, number)) in places.0.iter_mut().zip(offsets(opcode, operation)) {
            let own = request
                .get(*at..)
                .and_then(|rest| rest.first_chunk())
                .map_or(0, |own| u64::from_ne_bytes(*own));
            *slot = Some(Place { at: *at, number: *number, own });
        }
        places
    }

    pub fn iter(&self) -> impl Iterator<Item = &Place> {
        self.0.iter().flatten()
    }

    fn nth(&self, number: Number, nth: usize) -> u64 {
        self.iter().filter(|place| place.number == number).nth(nth).map_or(0, |place| place.own)
    }

    /// The node that is asked about.
    pub fn node(&self) -> u64 {
        self.nth(Number::Node, 0)
    }

    /// The second: a new parent, what gets a link, what is copied to.
    pub fn other_node(&self) -> u64 {
        self.nth(Number::Node, 1)
    }

    /// The open file, if one is named.
    pub fn file(&self) -> Option<u64> {
        self.iter().find(|place| place.number == Number::File).map(|place| place.own)
    }
}

/// Writes a number into a request.
pub(super) fn patch(request: &mut [u8], at: usize, number: u64) {
    if let Some(room) = request.get_mut(at..).and_then(|rest| rest.first_chunk_mut()) {
        *room = number.to_ne_bytes();
    }
}

/// Makes a 32-bit length in a request no more than `most`.
pub(super) fn limit(request: &mut [u8], at: usize, most: usize) {
    if let Some(room) = request.get_mut(at..).and_then(|rest| rest.first_chunk_mut::<4>()) {
        let most = u32::try_from(most).unwrap_or(u32::MAX);
        *room = u32::from_ne_bytes(*room).min(most).to_ne_bytes();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use crate::abi::*;
    use crate::request::{self, Request};
    use zerocopy::IntoBytes;

    /// The numbers of a request with this body, and what it is once each was made another.
    fn places(opcode: Opcode, body: &[u8]) -> (Vec<(Number, u64)>, Vec<u8>) {
        let header = InHeader {
            len: (IN_HEADER + body.len()) as u32,
            opcode: opcode as u32,
            unique: 2,
            nodeid: 0xa1,
            uid: 7,
            ..InHeader::default()
        };
        let mut bytes = [header.as_bytes(), body].concat();
        let parsed = Request::parse(request::header(&bytes).unwrap(), &bytes[IN_HEADER..], false).unwrap();
        let places = Places::of(&bytes, opcode, &parsed.operation);
        let found = places.iter().map(|place| (place.number, place.own)).collect();
        for place in places.iter() {
            patch(&mut bytes, place.at, place.own + 0x1000);
        }
        (found, bytes)
    }

    fn body_of(bytes: &[u8]) -> &[u8] {
        &bytes[IN_HEADER..]
    }

    #[test]
    fn every_opcode_has_its_numbers() {
        use Number::{File, Node};
        let node = (Node, 0xa1);
        let name = b"name\0other\0".as_slice();
        // Only the node.
        let open = OpenIn { flags: 0xa2, open_flags: 0xa3 };
        let create = CreateIn { flags: 0xa2, mode: 0xa3, umask: 0xa4, open_flags: 0xa5 };
        let xattr: [u32; 2] = [4, 0];
        for (opcode, body) in [
            (Opcode::Lookup, name.to_vec()),
            (Opcode::ReadLink, Vec::new()),
            (Opcode::SymLink, name.to_vec()),
            (Opcode::MkNod, [MkNodIn::default().as_bytes(), name].concat()),
            (Opcode::MkDir, [MkDirIn::default().as_bytes(), name].concat()),
            (Opcode::Unlink, name.to_vec()),
            (Opcode::RmDir, name.to_vec()),
            (Opcode::Open, open.as_bytes().to_vec()),
            (Opcode::OpenDir, open.as_bytes().to_vec()),
            (Opcode::Create, [create.as_bytes(), name].concat()),
            (Opcode::TmpFile, [create.as_bytes(), name].concat()),
            (Opcode::StatFs, Vec::new()),
            (Opcode::SyncFs, vec![0; 8]),
            (Opcode::SetXattr, [xattr.as_bytes(), b"user.x\0abcd"].concat()),
            (Opcode::GetXattr, [xattr.as_bytes(), b"user.x\0"].concat()),
            (Opcode::ListXattr, xattr.as_bytes().to_vec()),
            (Opcode::RemoveXattr, b"user.x\0".to_vec()),
            (Opcode::Access, AccessIn { mask: 4, padding: 0 }.as_bytes().to_vec()),
            (Opcode::GetAttr, GetAttrIn { fh: 9, ..GetAttrIn::default() }.as_bytes().to_vec()),
            (Opcode::SetAttr, SetAttrIn { fh: 9, ..SetAttrIn::default() }.as_bytes().to_vec()),
            (Opcode::StatX, StatXIn { fh: 9, ..StatXIn::default() }.as_bytes().to_vec()),
        ] {
            let (found, bytes) = places(opcode, &body);
            assert_eq!(found, [node], "{opcode:?}");
            assert_eq!(request::header(&bytes).unwrap().nodeid, 0x10a1, "{opcode:?}");
            assert_eq!(body_of(&bytes), body, "{opcode:?}");
        }
        // A second node.
        for opcode in [Opcode::Rename, Opcode::Rename2, Opcode::Link] {
            let head = match opcode {
                Opcode::Rename2 => Rename2In { newdir: 0xb1, flags: 1, padding: 0 }.as_bytes().to_vec(),
                _ => LinkIn { oldnodeid: 0xb1 }.as_bytes().to_vec(),
            };
            let (found, bytes) = places(opcode, &[&head, name].concat());
            assert_eq!(found, [node, (Node, 0xb1)], "{opcode:?}");
            assert_eq!(body_of(&bytes)[..8], 0x10b1_u64.to_ne_bytes());
            assert_eq!(body_of(&bytes)[8..], [&head[8..], name].concat());
        }
        // An open file.
        let fh = 0xc1;
        let lk = LkIn { fh, owner: 0xd1, ..LkIn::default() };
        for (opcode, body) in [
            (Opcode::Read, ReadIn { fh, ..ReadIn::default() }.as_bytes().to_vec()),
            (Opcode::ReadDir, ReadIn { fh, ..ReadIn::default() }.as_bytes().to_vec()),
            (Opcode::ReadDirPlus, ReadIn { fh, ..ReadIn::default() }.as_bytes().to_vec()),
            (Opcode::Write, WriteIn { fh, ..WriteIn::default() }.as_bytes().to_vec()),
            (Opcode::Release, ReleaseIn { fh, ..ReleaseIn::default() }.as_bytes().to_vec()),
            (Opcode::ReleaseDir, ReleaseIn { fh, ..ReleaseIn::default() }.as_bytes().to_vec()),
            (Opcode::Flush, FlushIn { fh, ..FlushIn::default() }.as_bytes().to_vec()),
            (Opcode::Fsync, FsyncIn { fh, ..FsyncIn::default() }.as_bytes().to_vec()),
            (Opcode::FsyncDir, FsyncIn { fh, ..FsyncIn::default() }.as_bytes().to_vec()),
            (Opcode::GetLk, lk.as_bytes().to_vec()),
            (Opcode::SetLk, lk.as_bytes().to_vec()),
            (Opcode::SetLkW, lk.as_bytes().to_vec()),
            (Opcode::Ioctl, IoctlIn { fh, ..IoctlIn::default() }.as_bytes().to_vec()),
            (Opcode::Fallocate, FallocateIn { fh, ..FallocateIn::default() }.as_bytes().to_vec()),
            (Opcode::Lseek, LseekIn { fh, ..LseekIn::default() }.as_bytes().to_vec()),
        ] {
            let (found, bytes) = places(opcode, &body);
            assert_eq!(found, [node, (File, fh)], "{opcode:?}");
            assert_eq!(body_of(&bytes)[..8], 0x10c1_u64.to_ne_bytes(), "{opcode:?}");
            assert_eq!(body_of(&bytes)[8..], body[8..], "{opcode:?}");
        }
        // One that is named by a flag.
        for (opcode, body) in [
            (Opcode::GetAttr, GetAttrIn { getattr_flags: GETATTR_FH, dummy: 0, fh }.as_bytes().to_vec()),
            (
                Opcode::SetAttr,
                SetAttrIn { valid: Valid::FH.bits(), fh, ..SetAttrIn::default() }.as_bytes().to_vec(),
            ),
            (
                Opcode::StatX,
                StatXIn { getattr_flags: GETATTR_FH, fh, ..StatXIn::default() }.as_bytes().to_vec(),
            ),
        ] {
            let (found, bytes) = places(opcode, &body);
            assert_eq!(found, [node, (File, fh)], "{opcode:?}");
            assert_eq!(body_of(&bytes)[8..16], 0x10c1_u64.to_ne_bytes(), "{opcode:?}");
        }
        // Two files of two nodes.
        let copy =
            CopyFileRangeIn { fh_in: 1, off_in: 2, nodeid_out: 3, fh_out: 4, off_out: 5, len: 6, flags: 7 };
        for opcode in [Opcode::CopyFileRange, Opcode::CopyFileRange64] {
            let (found, bytes) = places(opcode, copy.as_bytes());
            assert_eq!(found, [node, (File, 1), (Node, 3), (File, 4)]);
            let changed = CopyFileRangeIn { fh_in: 0x1001, nodeid_out: 0x1003, fh_out: 0x1004, ..copy };
            assert_eq!(body_of(&bytes), changed.as_bytes());
        }
        // What is answered without being asked of others.
        for (opcode, body) in [
            (Opcode::Forget, vec![1; 8]),
            (Opcode::BatchForget, vec![0; 8]),
            (Opcode::Init, vec![0; 64]),
            (Opcode::Destroy, Vec::new()),
            (Opcode::Interrupt, vec![0; 8]),
            (Opcode::Bmap, vec![0; 16]),
            (Opcode::Poll, vec![0; 24]),
            (Opcode::NotifyReply, vec![0; 40]),
            (Opcode::SetupMapping, vec![0; 40]),
            (Opcode::RemoveMapping, vec![0; 24]),
        ] {
            assert_eq!(places(opcode, &body).0, [], "{opcode:?}");
        }
    }

    #[test]
    fn lengths_are_limited() {
        let mut bytes = [0xff; 8];
        limit(&mut bytes, 2, 0x1234);
        assert_eq!(bytes[2..6], 0x1234_u32.to_ne_bytes());
        limit(&mut bytes, 2, 0x5678);
        assert_eq!(bytes[2..6], 0x1234_u32.to_ne_bytes());
        // Beyond the end nothing happens.
        limit(&mut bytes, 6, 1);
        patch(&mut bytes, 3, 1);
        assert_eq!(bytes[6..], [0xff, 0xff]);
    }
}
