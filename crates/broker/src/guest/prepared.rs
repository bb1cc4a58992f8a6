//! What a guest announced of the connections that are to come.

use kso_wire::guest::Prepare;
use std::collections::{HashMap, VecDeque};

/// Most that are remembered: what comes first is forgotten first. A guest connects soon after it announced.
const MAX_PREPARED: usize = 1024;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Prepared {
    by_port: HashMap<u32, (u64, Prepare)>,
    /// In order of arrival; also such as were taken or replaced since.
    order: VecDeque<(u64, u32)>,
    serial: u64,
}

impl Prepared {
    /// Remembers; what was announced for the same port before is forgotten.
    pub fn insert(&mut self, prepare: Prepare) {
        self.serial += 1;
        self.order.push_back((self.serial, prepare.local_port));
        self.by_port.insert(prepare.local_port, (self.serial, prepare));
        while self.by_port.len() > MAX_PREPARED
            && let Some((serial, port)) = self.order.pop_front()
        {
            self.by_port.remove_if(port, serial);
        }
        if self.order.len() > 2 * MAX_PREPARED {
            let by_port = &self.by_port;
            self.order.retain(|(serial, port)| by_port.get(port).is_some_and(|(live, _)| live == serial));
        }
    }

    /// What was announced for a port.
    pub fn take(&mut self, port: u32) -> Option<Prepare> {
        self.by_port.remove(&port).map(|(_, prepare)| prepare)
    }
}

trait RemoveIf {
    fn remove_if(&mut self, port: u32, serial: u64);
}

impl RemoveIf for HashMap<u32, (u64, Prepare)> {
    fn remove_if(&mut self, port: u32, serial: u64) {
        if self.get(&port).is_some_and(|(live, _)| *live == serial) {
            self.remove(&port);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use kso_wire::{Caller, Connect, Family, Origin, SocketOptions};

    fn prepare(local_port: u32, peer: &str) -> Prepare {
        let connect = Connect {
            peer: peer.parse().unwrap(),
            family: Family::V4,
            local: None,
            options: SocketOptions::default(),
            origin: Origin::Intercepted,
        };
        Prepare { local_port, caller: Caller::default(), connect }
    }

    #[test]
    fn the_last_one_counts_and_the_oldest_give_way() {
        let mut prepared = Prepared::default();
        prepared.insert(prepare(7, "192.0.2.1:1"));
        prepared.insert(prepare(7, "192.0.2.2:2"));
        assert_eq!(prepared.take(7).unwrap().connect.peer.port(), 2);
        assert!(prepared.take(7).is_none());
        for port in 0..10_000 {
            prepared.insert(prepare(port, "192.0.2.1:1"));
            if port % 3 == 0 {
                prepared.take(port);
            }
        }
        assert!(prepared.by_port.len() <= MAX_PREPARED && prepared.order.len() <= 2 * MAX_PREPARED + 1);
        assert!(prepared.take(9_998).is_some() && prepared.take(1).is_none());
        for _ in 0..10_000 {
            prepared.insert(prepare(3, "192.0.2.1:1"));
        }
        assert!(prepared.order.len() <= 2 * MAX_PREPARED + 1);
    }
}
