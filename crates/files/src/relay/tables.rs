//! All that the relay knows of its client, apart from requests.

use super::files::Files;
use super::nodes::Nodes;
use crate::abi::Features;

/// Nodes, open files and locks, and which life of the performer is the present one.
#[derive(Debug)]
pub(super) struct Tables {
    pub nodes: Nodes,
    pub files: Files,
    /// What was agreed on with the client.
    pub features: Features,
    life: u64,
}

impl Tables {
    /// Of a client that begins. `life` is one that never was before.
    pub fn new(life: u64) -> Self {
        let mut tables =
            Self { nodes: Nodes::new(), files: Files::default(), features: Features::empty(), life };
        tables.begin(life);
        tables
    }

    /// Another performer, who knows nothing of all this.
    pub fn begin(&mut self, life: u64) {
        self.life = life;
        self.nodes.begin(life);
        self.files.begin(life);
    }

    pub fn life(&self) -> u64 {
        self.life
    }

    pub fn has(&self, feature: Features) -> bool {
        self.features.contains(feature)
    }

    /// The performing kernel began anew, and what it had not written is lost.
    pub fn lose(&mut self) {
        let nodes = &self.nodes;
        self.files.lose(|node| nodes.is_dirty(node));
        self.nodes.all_synced();
    }
}
