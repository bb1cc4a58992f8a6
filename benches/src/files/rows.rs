//! What is measured of files, and what is wanted of it.

use super::place::Way;

/// Four guests read one file.
pub const PAGE_CACHE: &str = "page-cache";

/// What is done.
#[derive(Clone, Copy, Debug)]
pub enum Work {
    /// `kso-bench disk` with this word, on the way's directory.
    Files(&'static str),
    /// nginx serves this file of it, by sendfile, to clients on the host.
    Serve(&'static str),
}

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    pub name: &'static str,
    pub title: &'static str,
    pub unit: &'static str,
    pub work: Work,
    /// At least so much of what these ways reach.
    pub targets: &'static [(Way, f64)],
}

/// Metadata and small I/O.
const SMALL: &[(Way, f64)] = &[(Way::Virtiofsd, 1.5)];
const BULK: &[(Way, f64)] = &[(Way::Virtiofsd, 1.0)];
const SERVED: &[(Way, f64)] = &[(Way::Native, 0.8), (Way::Virtiofsd, 6.0), (Way::Disk, 6.0)];

const fn files(
    name: &'static str,
    title: &'static str,
    unit: &'static str,
    targets: &'static [(Way, f64)],
) -> Row {
    Row { name, title, unit, work: Work::Files(name), targets }
}

/// In the order of the table.
pub const ROWS: &[Row] = &[
    files("read-cold", "read 256 MiB in sequence, nothing cached in the guest", "MB/s", BULK),
    files("read-warm", "the same again", "MB/s", BULK),
    files("write", "write 64 MiB in sequence, fsync", "MB/s", BULK),
    files("read-random", "4 KiB reads at random, not cached in the guest", "IOPS", SMALL),
    files("write-random", "4 KiB writes at random", "IOPS", SMALL),
    files("stat", "stat of 1,000 files, again and again", "/s", SMALL),
    files("walk", "readdir and stat of 1,000 files, nothing cached in the guest", "files/s", SMALL),
    files("open-read-close", "open, read 4 KiB, close", "/s", SMALL),
    files("create-unlink", "create, close, unlink", "/s", SMALL),
    Row {
        name: "nginx-10m",
        title: "nginx in the guest, 10 MB to 4 clients on the host",
        unit: "MB/s",
        work: Work::Serve("10m"),
        targets: SERVED,
    },
    Row {
        name: "nginx-100m",
        title: "the same, 100 MB",
        unit: "MB/s",
        work: Work::Serve("100m"),
        targets: SERVED,
    },
];
