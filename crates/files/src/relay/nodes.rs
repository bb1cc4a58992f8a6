//! The nodes that the client knows, by numbers of the relay's own, and what is needed to find each again.
//!
//! ```text
//!   looked up by the client ---> known here  <---- its number there is of this life: used as it is
//!                                  |   ^
//!                the performer dies|   | by name, from the root: the same inode number, generation and kind
//!                                  v   |
//!                                 lost ---- there is none by its names, or another ----> stale: ESTALE, until the client
//!                                                                                        itself looks up the same inode
//! ```

use super::Refused;
use crate::abi::{self, EntryOut, ROOT};
use crate::slots::Slots;
use rustix::io::Errno;
use std::collections::HashMap;

/// At most so many.
const MAX_NODES: usize = 1 << 20;
/// So many names of one node are remembered: a file with more links is found by those that were used last.
const MAX_NAMES: usize = 4;
/// The file type in a mode (`S_IFMT`, inode(7)).
const KIND: u32 = 0o170_000;

/// By what an inode is known again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Identity {
    inode: u64,
    generation: u64,
    kind: u32,
}

impl Identity {
    fn of(entry: &EntryOut) -> Self {
        Self { inode: entry.attr.ino, generation: entry.generation, kind: entry.attr.mode & KIND }
    }

    /// Such a thing can be.
    fn is_valid(self) -> bool {
        // S_IFIFO, S_IFCHR, S_IFDIR, S_IFBLK, S_IFREG, S_IFLNK, S_IFSOCK.
        matches!(self.kind >> 12, 1 | 2 | 4 | 6 | 8 | 10 | 12)
    }
}

/// A name in a directory, by the directory's own number.
pub(super) type Name = (u64, Box<[u8]>);

/// What the performer calls it.
#[derive(Clone, Copy, Debug)]
struct There {
    /// In which life.
    life: u64,
    number: u64,
    /// How often it was looked up there.
    lookups: u64,
}

#[derive(Debug)]
struct Node {
    names: Vec<Name>,
    identity: Identity,
    /// By the client, and not forgotten. A node of none is here for the sake of what is in it.
    lookups: u64,
    there: Option<There>,
    /// Names of others that are in it.
    children: usize,
    stale: bool,
    /// What was written, and how much of it is on disk.
    written: u64,
    synced: u64,
}

/// What cannot be used as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Missing {
    /// It is not known, or is stale.
    Error(Errno),
    /// It must be looked up again.
    Lost,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Nodes {
    slots: Slots<Node>,
    life: u64,
    /// Own numbers by those of this life.
    there: HashMap<u64, u64>,
    identities: HashMap<Identity, u64>,
    names: HashMap<Name, u64>,
    /// What the performer is to forget: number and lookups.
    forgotten: Vec<(u64, u64)>,
}

impl Nodes {
    /// None but the root.
    pub fn new() -> Self {
        let mut nodes = Self::default();
        let identity = Identity { inode: 0, generation: 0, kind: 0o040_000 };
        nodes.slots.insert(|_| Node {
            names: Vec::new(),
            identity,
            lookups: 1,
            there: None,
            children: 0,
            stale: false,
            written: 0,
            synced: 0,
        });
        nodes
    }

    /// Another performer, who knows none of them: lives have numbers that only grow.
    pub fn begin(&mut self, life: u64) {
        self.life = life;
        self.there.clear();
        self.forgotten.clear();
    }

    /// What the performer calls a node.
    pub fn there(&self, own: u64) -> Result<u64, Missing> {
        if own == ROOT {
            // The root is what is shared, whatever it is now.
            return Ok(ROOT);
        }
        let node = self.slots.get(own).ok_or(Missing::Error(Errno::STALE))?;
        match node.there.filter(|there| there.life == self.life) {
            _ if node.stale => Err(Missing::Error(Errno::STALE)),
            Some(there) => Ok(there.number),
            None => Err(Missing::Lost),
        }
    }

    /// An entry that the client is to be told: what the performer said of `name`, or of something without a name. The entry
    /// gets the numbers that the client knows.
    pub fn enter(&mut self, name: Option<(u64, &[u8])>, entry: &mut EntryOut) -> Result<u64, Refused> {
        let identity = Identity::of(entry);
        if entry.nodeid == 0 || !identity.is_valid() {
            return Err(Refused::Lie("an entry that is none"));
        }
        if entry.nodeid == ROOT {
            // No kernel takes its root for an entry.
            return Err(Refused::Errno(Errno::IO));
        }
        let own = match self.there.get(&entry.nodeid) {
            Some(own) => *own,
            None => match self.adopt(name, identity) {
                Some(own) => own,
                None => self.insert(identity).inspect_err(|_| self.forgotten.push((entry.nodeid, 1)))?,
            },
        };
        let life = self.life;
        let node = self.slots.get_mut(own).ok_or(Refused::Errno(Errno::IO))?;
        if node.identity != identity {
            return Err(Refused::Lie("a node that has become another"));
        }
        let before = node.there.filter(|there| there.life == life);
        let lookups = before.map_or(0, |there| there.lookups).saturating_add(1);
        node.there = Some(There { life, number: entry.nodeid, lookups });
        node.lookups = node.lookups.saturating_add(1);
        node.stale = false;
        self.there.insert(entry.nodeid, own);
        if let Some((parent, name)) = name {
            self.name(own, parent, name);
        }
        entry.nodeid = own;
        Ok(own)
    }

    /// A node from before that this is, surely.
    fn adopt(&self, name: Option<(u64, &[u8])>, identity: Identity) -> Option<u64> {
        let own = *self.identities.get(&identity)?;
        let node = self.slots.get(own)?;
        if node.there.is_some_and(|there| there.life == self.life) {
            return None;
        }
        // Where inodes have no generation, the name must be the same too.
        let named = || name.is_some_and(|(parent, name)| self.find(parent, name) == Some(own));
        (identity.generation != 0 || named()).then_some(own)
    }

    fn insert(&mut self, identity: Identity) -> Result<u64, Refused> {
        let node = Node {
            names: Vec::new(),
            identity,
            lookups: 0,
            there: None,
            children: 0,
            stale: false,
            written: 0,
            synced: 0,
        };
        if self.slots.len() >= MAX_NODES {
            return Err(Refused::Errno(Errno::NFILE));
        }
        let own = self.slots.insert(|_| node).ok_or(Refused::Errno(Errno::NFILE))?;
        self.identities.insert(identity, own);
        Ok(own)
    }

    fn find(&self, parent: u64, name: &[u8]) -> Option<u64> {
        self.names.get(&(parent, name.into())).copied()
    }

    /// A node has this name from now on.
    fn name(&mut self, own: u64, parent: u64, name: &[u8]) {
        if self.find(parent, name) == Some(own) || parent == own {
            return;
        }
        self.unnamed(parent, name);
        if self.slots.get(own).is_none() {
            return;
        }
        let Some(directory) = self.slots.get_mut(parent) else { return };
        directory.children += 1;
        self.names.insert((parent, name.into()), own);
        let Some(node) = self.slots.get_mut(own) else { return };
        node.names.push((parent, name.into()));
        if node.names.len() > MAX_NAMES {
            let (parent, name) = node.names.remove(0);
            self.names.remove(&(parent, name));
            self.left(parent);
        }
    }

    /// Nothing has this name any more.
    pub fn unnamed(&mut self, parent: u64, name: &[u8]) {
        let Some(own) = self.names.remove(&(parent, name.into())) else { return };
        if let Some(node) = self.slots.get_mut(own) {
            node.names.retain(|(directory, known)| !(*directory == parent && **known == *name));
        }
        self.left(parent);
    }

    /// A name has another place, or two have each other's.
    pub fn renamed(&mut self, (from, old): (u64, &[u8]), (to, new): (u64, &[u8]), exchanged: bool) {
        let (moved, other) = (self.find(from, old), self.find(to, new));
        if moved.is_some() && moved == other {
            // Two links of one file: rename(2) leaves both.
            return;
        }
        self.unnamed(from, old);
        self.unnamed(to, new);
        if let Some(moved) = moved {
            self.name(moved, to, new);
        }
        if let Some(other) = other.filter(|_| exchanged) {
            self.name(other, from, old);
        }
    }

    /// Nobody knows whether a name was given another place: from now on it has both.
    pub fn perhaps_renamed(&mut self, (from, old): (u64, &[u8]), (to, new): (u64, &[u8])) {
        if let (Some(moved), None) = (self.find(from, old), self.find(to, new)) {
            self.name(moved, to, new);
        }
    }

    /// A name in a directory is no more; neither is the directory, if nobody else needs it.
    fn left(&mut self, parent: u64) {
        if let Some(node) = self.slots.get_mut(parent) {
            node.children = node.children.saturating_sub(1);
        }
        self.collect(parent);
    }

    /// Removes a node that nobody needs, and the directories that were there for its sake.
    fn collect(&mut self, own: u64) {
        let mut next = Some(own);
        let mut more = Vec::new();
        while let Some(own) = next.take().or_else(|| more.pop()) {
            let unneeded = self.slots.get(own).is_some_and(|node| node.lookups == 0 && node.children == 0);
            if own == ROOT || !unneeded {
                continue;
            }
            let Some(node) = self.slots.remove(own) else { continue };
            if let Some(there) = node.there.filter(|there| there.life == self.life) {
                self.forget_there(own, there);
            }
            if self.identities.get(&node.identity) == Some(&own) {
                self.identities.remove(&node.identity);
            }
            for name in node.names {
                if let Some(directory) = self.slots.get_mut(name.0) {
                    directory.children = directory.children.saturating_sub(1);
                    more.push(name.0);
                }
                self.names.remove(&name);
            }
        }
    }

    fn forget_there(&mut self, own: u64, there: There) {
        self.forgotten.push((there.number, there.lookups));
        if self.there.get(&there.number) == Some(&own) {
            self.there.remove(&there.number);
        }
    }

    /// The client forgets so many lookups.
    pub fn forget(&mut self, own: u64, lookups: u64) {
        let Some(node) = self.slots.get_mut(own).filter(|_| own != ROOT) else { return };
        node.lookups = node.lookups.saturating_sub(lookups);
        if node.lookups > 0 {
            return;
        }
        let there = node.there.take().filter(|there| there.life == self.life);
        if let Some(there) = there {
            self.forget_there(own, there);
        }
        self.collect(own);
    }

    /// What the performer is to forget since the last time: numbers of its, and lookups.
    pub fn take_forgotten(&mut self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.forgotten)
    }

    /// By which names a lost node may be found.
    pub fn names(&self, own: u64) -> Vec<Name> {
        // The one that was used last is the likeliest.
        self.slots.get(own).map(|node| node.names.iter().rev().cloned().collect()).unwrap_or_default()
    }

    /// What was found by a name of a lost node, of this life. `true`: it is the node.
    pub fn found(&mut self, own: u64, entry: &EntryOut) -> bool {
        let life = self.life;
        let same = match self.slots.get_mut(own) {
            Some(node) if node.identity == Identity::of(entry) => {
                let before = node.there.filter(|there| there.life == life && there.number == entry.nodeid);
                let lookups = before.map_or(0, |there| there.lookups).saturating_add(1);
                node.there = Some(There { life, number: entry.nodeid, lookups });
                true
            }
            _ => false,
        };
        if same {
            self.there.entry(entry.nodeid).or_insert(own);
        } else {
            self.forgotten.push((entry.nodeid, 1));
        }
        same
    }

    /// It cannot be found by any name.
    pub fn not_found(&mut self, own: u64) {
        if let Some(node) = self.slots.get_mut(own) {
            node.stale = true;
        }
    }

    /// Whether these attributes may be of that node.
    pub fn plausible(&self, own: u64, attributes: &abi::Attr) -> bool {
        self.slots.get(own).is_none_or(|node| node.identity.kind == attributes.mode & KIND)
    }

    /// Something of it was changed that a crash of the kernel there may undo.
    pub fn wrote(&mut self, own: u64) {
        if let Some(node) = self.slots.get_mut(own) {
            node.written += 1;
        }
    }

    /// How much was written; told to [`Self::synced`] when that much is on disk.
    pub fn written(&self, own: u64) -> u64 {
        self.slots.get(own).map_or(0, |node| node.written)
    }

    /// So much is on disk.
    pub fn synced(&mut self, own: u64, written: u64) {
        if let Some(node) = self.slots.get_mut(own) {
            node.synced = node.synced.max(written.min(node.written));
        }
    }

    /// Whether something of it may be lost.
    pub fn is_dirty(&self, own: u64) -> bool {
        self.slots.get(own).is_some_and(|node| node.synced < node.written)
    }

    /// All are on disk, or it is told that they are not.
    pub fn all_synced(&mut self) {
        for node in self.slots.values_mut() {
            node.synced = node.written;
        }
    }

    /// How many there are, of which each fits the others. For tests and fuzzing.
    pub fn count(&mut self) -> usize {
        let mut children: HashMap<u64, usize> = HashMap::new();
        let mut names = 0;
        let all: Vec<(u64, Vec<Name>)> =
            self.slots.iter_mut().map(|(own, node)| (own, node.names.clone())).collect();
        for (own, known) in &all {
            names += known.len();
            for name in known {
                assert_eq!(self.names.get(name), Some(own), "a name leads elsewhere");
                *children.entry(name.0).or_default() += 1;
            }
        }
        assert_eq!(names, self.names.len(), "a name leads nowhere");
        for (own, node) in self.slots.iter_mut() {
            assert_eq!(node.children, children.remove(&own).unwrap_or(0), "children are not counted right");
            assert!(own == ROOT || node.lookups > 0 || node.children > 0, "a node is left behind");
        }
        assert!(children.is_empty(), "names are in no directory");
        assert!(self.there.values().all(|own| self.slots.get(*own).is_some()), "a number leads nowhere");
        assert!(self.identities.values().all(|own| self.slots.get(*own).is_some()), "an inode leads nowhere");
        all.len()
    }
}
