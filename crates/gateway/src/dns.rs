//! As much of DNS messages (RFC 1035) as it takes to answer over UDP: how long an answer may be, and answers
//! made here.

use crate::packet::{put, u16_at};

/// Bytes of the header.
const HEADER: usize = 12;
/// How long an answer over UDP may be if the query does not say (RFC 1035, 2.3.4).
const PLAIN_LIMIT: usize = 512;
/// The type of the record that says so (RFC 6891).
const OPT: u16 = 41;
/// Records that are looked at for it.
const MAX_RECORDS: usize = 32;
/// Longest name, bytes.
const MAX_NAME: usize = 255;
const FLAG_RESPONSE: u8 = 0x80;
const FLAG_TRUNCATED: u8 = 0x02;

/// Response codes that are given here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The resolver could not be asked.
    ServerFailure = 2,
    /// Policy.
    Refused = 5,
}

/// Whether a message can be a query.
#[must_use]
pub fn is_query(message: &[u8]) -> bool {
    message.len() >= HEADER && message.get(2).is_some_and(|flags| flags & FLAG_RESPONSE == 0)
}

/// The longest answer over UDP that the sender of `query` takes, bytes.
#[must_use]
pub fn answer_limit(query: &[u8]) -> usize {
    announced(query).map_or(PLAIN_LIMIT, |size| usize::from(size).max(PLAIN_LIMIT))
}

fn announced(query: &[u8]) -> Option<u16> {
    let mut at = questions_end(query)?;
    let records = [6, 8, 10].into_iter().filter_map(|count| u16_at(query, count)).map(usize::from).sum();
    for _ in 0..std::cmp::min(records, MAX_RECORDS) {
        at = name_end(query, at)?;
        // Type, class (the size, of an OPT record), time to live, length of the data.
        if u16_at(query, at)? == OPT {
            return u16_at(query, at + 2);
        }
        at += 10 + usize::from(u16_at(query, at + 8)?);
    }
    None
}

/// Where the name at `at` ends.
fn name_end(message: &[u8], mut at: usize) -> Option<usize> {
    for _ in 0..MAX_NAME {
        let length = *message.get(at)?;
        match length >> 6 {
            0 if length == 0 => return Some(at + 1),
            0 => at += 1 + usize::from(length),
            3 => return Some(at + 2),
            _ => return None,
        }
    }
    None
}

fn questions_end(message: &[u8]) -> Option<usize> {
    let mut at = HEADER;
    for _ in 0..usize::from(u16_at(message, 4)?).min(MAX_RECORDS) {
        at = name_end(message, at)? + 4;
    }
    (at <= message.len()).then_some(at)
}

/// Cuts an answer that is too long to its header and questions, and says so, so that the asker comes again by TCP.
pub fn truncate(answer: &mut Vec<u8>, limit: usize) {
    if answer.len() <= limit {
        return;
    }
    match questions_end(answer).filter(|end| *end <= limit) {
        Some(end) => answer.truncate(end),
        None => {
            answer.truncate(HEADER);
            put(answer, 4, &[0, 0]);
        }
    }
    put(answer, 6, &[0; 6]);
    if let Some(flags) = answer.get_mut(2) {
        *flags |= FLAG_TRUNCATED;
    }
}

/// An answer to `query` without records.
#[must_use]
pub fn failure(query: &[u8], code: Code) -> Vec<u8> {
    let mut answer = query.get(..questions_end(query).unwrap_or(HEADER)).unwrap_or_default().to_vec();
    answer.resize(answer.len().max(HEADER), 0);
    if questions_end(query).is_none() {
        put(&mut answer, 4, &[0, 0]);
    }
    put(&mut answer, 6, &[0; 6]);
    if let Some(flags) = answer.get_mut(2) {
        // Kept: the kind of query, and whether recursion is desired.
        *flags = (*flags & 0x79) | FLAG_RESPONSE;
    }
    // Recursion is available.
    put(&mut answer, 3, &[0x80 | code as u8]);
    answer
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A query for example.test, with an OPT record if a size is given.
    fn query(size: Option<u16>) -> Vec<u8> {
        let mut message = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, u8::from(size.is_some())];
        message.extend_from_slice(b"\x07example\x04test\x00\x00\x01\x00\x01");
        if let Some(size) = size {
            message.extend_from_slice(&[0, 0, 41]);
            message.extend_from_slice(&size.to_be_bytes());
            message.extend_from_slice(&[0; 6]);
        }
        message
    }

    #[test]
    fn the_limit_is_what_the_query_says() {
        assert_eq!(answer_limit(&query(None)), 512);
        assert_eq!(answer_limit(&query(Some(1232))), 1232);
        assert_eq!(answer_limit(&query(Some(100))), 512);
        assert_eq!(answer_limit(b"short"), 512);
    }

    #[test]
    fn a_long_answer_is_cut_and_says_so() {
        let mut answer = query(None);
        let questions = answer.len();
        answer[2] |= 0x80;
        answer[7] = 3;
        answer.resize(600, 7);
        let mut whole = answer.clone();
        truncate(&mut whole, 600);
        assert_eq!(whole, answer);
        truncate(&mut answer, 512);
        assert_eq!(answer.len(), questions);
        assert_eq!(answer[2] & 0x82, 0x82);
        assert_eq!(answer[6..12], [0; 6]);
    }

    #[test]
    fn a_failure_repeats_the_question() {
        let asked = query(Some(1232));
        let answer = failure(&asked, Code::ServerFailure);
        assert_eq!(answer.len(), query(None).len());
        assert_eq!(answer[..4], [0x12, 0x34, 0x81, 0x82]);
        assert_eq!(answer[4..12], [0, 1, 0, 0, 0, 0, 0, 0]);
        assert!(!is_query(&answer) && is_query(&asked));
    }

    proptest! {
        #[test]
        fn nothing_panics(message in proptest::collection::vec(any::<u8>(), 0..200), limit in 12_usize..100) {
            let _ = (is_query(&message), answer_limit(&message));
            prop_assert!(failure(&message, Code::Refused).len() >= HEADER);
            let mut answer = message.clone();
            truncate(&mut answer, limit);
            prop_assert!(answer.len() <= limit);
        }
    }
}
