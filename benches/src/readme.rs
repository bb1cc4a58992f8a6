//! The short tables of the README, between marks of their own.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// Puts `table` between the marks of this name; a file without them stays as it is.
pub fn update(path: &Path, name: &str, table: &str) -> Result<()> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    if let Some(text) = replaced(&text, name, table) {
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn replaced(text: &str, name: &str, table: &str) -> Option<String> {
    let (begin, end) = (format!("<!-- {name}:begin -->"), format!("<!-- {name}:end -->"));
    let (before, rest) = text.split_once(&begin)?;
    let (_, after) = rest.split_once(&end)?;
    Some(format!("{before}{begin}\n{}\n{end}{after}", table.trim_end()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_the_marks_changes() {
        let text = "a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb";
        let wanted = "a\n<!-- x:begin -->\nnew\n<!-- x:end -->\nb";
        assert_eq!(replaced(text, "x", "new\n").as_deref(), Some(wanted));
        assert_eq!(replaced(text, "y", "new"), None);
    }
}
