//! Errors in a line of text that show the place.

use std::fmt;

/// What is wrong in a text, and where.
///
/// ```
/// let error = kso_core::publish::parse("80:99999").unwrap_err();
/// assert_eq!(
///     error.to_string(),
///     "cannot read the publication `80:99999`\n  80:99999\n     ^^^^^ a port is a number from 1 to 65535"
/// );
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misplaced {
    what: &'static str,
    text: String,
    at: usize,
    length: usize,
    why: String,
}

/// A piece of a text and what is wrong with it: [`Misplaced`] without the text around it.
pub(crate) type Wrong = (std::ops::Range<usize>, String);

impl Misplaced {
    /// `range` is in bytes of `text`; `what` says what the text was to be, such as "rule".
    pub(crate) fn new(what: &'static str, text: &str, (range, why): Wrong) -> Self {
        // Columns are counted in characters, so that the caret stands under the place in any script.
        let column = |byte: usize| text.char_indices().take_while(|(index, _)| *index < byte).count();
        let at = column(range.start);
        let length = column(range.end).saturating_sub(at).max(1);
        Self { what, text: printable(text), at, length, why }
    }

    /// The column of the place: characters from the beginning of the text, from 0.
    #[must_use]
    pub fn column(&self) -> usize {
        self.at
    }

    /// What is wrong, and what would be right.
    #[must_use]
    pub fn why(&self) -> &str {
        &self.why
    }
}

impl fmt::Display for Misplaced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, text, at, length, why } = self;
        write!(f, "cannot read the {what} `{text}`\n  {text}\n  {:at$}{:^<length$} {why}", "", "")
    }
}

impl std::error::Error for Misplaced {}

/// `text` with each control character replaced by `?`, one for one: what a program names itself, or a
/// message over the wire, must not drive the terminal of the person who reads it.
#[must_use]
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if is_unprintable(c) { '?' } else { c }).collect()
}

fn is_unprintable(c: char) -> bool {
    // Besides C0 and C1: the separators that end a line and the marks that turn the direction of writing.
    c.is_control()
        || matches!(c, '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}
