//! As much of ELF64 (elf(5), little-endian) as a module's description and a smaller binary need.

/// Bytes of an ELF64 header, of a program header and of a section header.
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const SECTION_HEADER: usize = 64;
/// `PT_LOAD`.
const LOAD: u32 = 1;

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk::<N>().copied()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<usize> {
    Some(u16::from_le_bytes(number(bytes, at)?).into())
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(number(bytes, at)?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u64::from_le_bytes(number(bytes, at)?)).ok()
}

fn is_elf64(bytes: &[u8]) -> bool {
    // Magic, ELFCLASS64, ELFDATA2LSB.
    bytes.len() >= HEADER && bytes.starts_with(b"\x7fELF\x02\x01")
}

/// The contents of the section of this name.
pub fn section<'a>(bytes: &'a [u8], wanted: &str) -> Option<&'a [u8]> {
    if !is_elf64(bytes) {
        return None;
    }
    let (table, count, names) = (u64_at(bytes, 0x28)?, u16_at(bytes, 0x3c)?, u16_at(bytes, 0x3e)?);
    let header =
        |index: usize| bytes.get(table.checked_add(index * SECTION_HEADER)?..)?.get(..SECTION_HEADER);
    let contents = |header: &[u8]| {
        let (start, length) = (u64_at(header, 0x18)?, u64_at(header, 0x20)?);
        bytes.get(start..start.checked_add(length)?)
    };
    let names = contents(header(names)?)?;
    (0..count).find_map(|index| {
        let header = header(index)?;
        let name = names.get(usize::try_from(u32_at(header, 0)?).ok()?..)?;
        let name = name.split(|&byte| byte == 0).next()?;
        if name == wanted.as_bytes() { contents(header) } else { None }
    })
}

/// What the kernel needs of an executable to run it: no sections, so neither symbols nor debug information.
/// What is no ELF64 executable comes back as it is.
pub fn strip(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = loaded(&bytes);
    if let Some(end) = end {
        bytes.truncate(end);
        // e_shoff; e_shentsize, e_shnum and e_shstrndx.
        for field in [0x28..0x30, 0x3a..0x40] {
            if let Some(field) = bytes.get_mut(field) {
                field.fill(0);
            }
        }
    }
    bytes
}

/// Where the last byte ends that is loaded.
fn loaded(bytes: &[u8]) -> Option<usize> {
    if !is_elf64(bytes) {
        return None;
    }
    let (table, count) = (u64_at(bytes, 0x20)?, u16_at(bytes, 0x38)?);
    let mut end = table.checked_add(count * PROGRAM_HEADER)?;
    for index in 0..count {
        let header = bytes.get(table.checked_add(index * PROGRAM_HEADER)?..)?;
        if u32_at(header, 0)? == LOAD {
            end = end.max(u64_at(header, 8)?.checked_add(u64_at(header, 0x20)?)?);
        }
    }
    (end <= bytes.len()).then_some(end)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_stripped_program_runs_and_is_smaller() {
        // This test, which has symbols, debug information and one more mode: listing itself.
        let whole = std::fs::read("/proc/self/exe").unwrap();
        assert!(section(&whole, ".text").is_some());
        let size = whole.len();
        let stripped = strip(whole);
        assert!(stripped.len() < size);
        assert!(section(&stripped, ".text").is_none());
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("stripped");
        std::fs::write(&path, stripped).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let output = std::process::Command::new(path).args(["--list", "elf::"]).output().unwrap();
        assert!(String::from_utf8_lossy(&output.stdout).contains("elf::tests::a_stripped_program"));
    }

    #[test]
    fn garbage_is_left_alone() {
        for bytes in
            [vec![], b"\x7fELF\x02\x01".to_vec(), [b"\x7fELF\x02\x01".as_slice(), &[0xff; 80]].concat()]
        {
            assert_eq!(strip(bytes.clone()), bytes);
            assert_eq!(section(&bytes, ".modinfo"), None);
        }
    }
}
