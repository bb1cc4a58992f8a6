//! `Resolve`: what a session asks for its names.

use crate::broker::Broker;
use crate::dns::forward::Done;
use crate::dns::hosts::Watched;
use crate::dns::{self, local};
use crate::session::{Session, SessionId};
use crate::streams::denied;
use hickory_proto::op::Message;
use kso_core::event::{self, Kind};
use kso_core::policy::{Decision, Policy};
use kso_wire::{Answer, Caller, Protocol, Reply, RequestId, Submitted};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// The host's names are looked at again after this time when a session connects.
const LOOK: Duration = Duration::from_secs(1);

impl Session {
    /// Whether it is time to look at the host's names again.
    pub(crate) fn names_may_be_old(&mut self) -> bool {
        let now = Instant::now();
        let old = now.duration_since(self.hosts_looked) >= LOOK;
        if old {
            self.hosts_looked = now;
        }
        old
    }

    pub(crate) fn load_hosts(&mut self, hosts: &Watched) {
        if self.hosts_version != hosts.version {
            self.hosts_version = hosts.version;
            self.names.load_hosts(&hosts.text);
        }
    }

    /// Whether a question may be asked. With rules by name alone the question of an address's name is
    /// permitted if the address was the answer to a name that is.
    fn decide_question(&self, broker: &Policy, query: &Message) -> Decision {
        let Some(question) = query.queries.first() else { return Decision::Allow };
        let decision = Policy::both_names(broker, &self.policy, &dns::text(question.name()));
        if !decision.is_allow()
            && let Some(address) = local::reverse(question.name(), question.query_type())
        {
            let known = self.names_for_people(address);
            if known.iter().any(|name| Policy::both_names(broker, &self.policy, name).is_allow()) {
                return Decision::Allow;
            }
        }
        decision
    }
}

impl Broker {
    pub(crate) fn resolve(
        &mut self,
        id: SessionId,
        request: RequestId,
        caller: &Caller,
        query: Vec<u8>,
    ) -> Submitted {
        let now = Instant::now();
        self.look_at_files(now);
        let guests = self.names_of_guests(id);
        let Some(session) = self.sessions.get_mut(&id.0) else {
            return done(Vec::new());
        };
        session.load_hosts(&self.hosts);
        session.counts.queries += 1;
        let message = match local::question(&query) {
            Ok(message) => message,
            Err(answer) => return done(answer),
        };
        if let Some(answer) = local::localhost(&message) {
            return done(answer);
        }
        if let Decision::Deny(reason) = session.decide_question(&self.shared.policy, &message) {
            session.counts.denied += 1;
            self.shared.totals.names_denied += 1;
            self.shared.totals.resolved("REFUSED");
            if self.shared.eyes.open() {
                let names = message.queries.iter().map(|question| dns::text(question.name())).collect();
                let kind = denied(None, None, Protocol::Udp, names, &reason);
                self.shared.eyes.see(id.0, &session.name, caller, kind);
            }
            return done(local::refused(&message, &reason.to_string()));
        }
        let asked = message.queries.first().map(|question| dns::text(question.name()).to_ascii_lowercase());
        let guest = guests.into_iter().find(|(name, _)| Some(name) == asked.as_ref());
        let known = local::Known {
            tun: &session.tun,
            names: &session.names,
            hosts: &self.hosts.text,
            guest: guest.map(|(_, address)| address),
        };
        if let Some(answer) = local::answer(&message, known) {
            self.answered(id, &answer, now.elapsed());
            return done(answer);
        }
        drop(message);
        match self.forwarder.ask(self.epoll.as_fd(), (id.0, request), query, now) {
            None => Submitted::Pending,
            Some(failed) => done(self.finish(failed)),
        }
    }

    /// A query that waited has ended.
    pub(crate) fn resolved(&mut self, ended: Done) {
        let (session, request) = ended.asker;
        let answer = self.finish(ended);
        let answer = Answer::plain(Ok(Reply::Resolved(answer)));
        self.completed.push_back((SessionId(session), request, answer));
    }

    fn finish(&mut self, ended: Done) -> Vec<u8> {
        let answer = ended
            .answer
            .or_else(|| Message::from_vec(&ended.query).ok().map(|query| local::failed(&query)))
            .unwrap_or_default();
        self.answered(SessionId(ended.asker.0), &answer, ended.took);
        answer
    }

    /// Remembers what an answer says, and tells of it.
    fn answered(&mut self, id: SessionId, answer: &[u8], took: Duration) {
        let Some(session) = self.sessions.get_mut(&id.0) else { return };
        let observed = match dns::observe(answer) {
            Ok(observed) => observed,
            Err(error) => {
                tracing::debug!(%error, "an answer is not understood: it counts for no rule");
                return;
            }
        };
        let now = Instant::now();
        for (address, life) in &observed.addresses {
            for name in &observed.names {
                session.names.remember(name, &[*address], *life, now);
            }
        }
        self.shared.totals.resolved(&observed.code);
        if self.shared.eyes.open() {
            let kind = Kind::Resolve(event::Resolve {
                name: observed.name,
                record: observed.record,
                code: observed.code,
                addresses: observed.addresses.into_iter().map(|(address, _)| address).collect(),
                duration_us: took.into(),
            });
            self.shared.eyes.see(id.0, &session.name, &Caller::default(), kind);
        }
    }
}

fn done(answer: Vec<u8>) -> Submitted {
    Submitted::Done(Answer::plain(Ok(Reply::Resolved(answer))))
}
