//! Serves directories to VMMs that something else starts: `serve_fs SOCKET TAG SOURCE [OPTION...] [-- SOCKET TAG SOURCE ...]`,
//! options as of `kso-files`' example `mount`.

use kso_devices::fs::{FsMount, Source};
use kso_files::{Cache, Share};
use std::os::unix::net::UnixListener;
use std::path::Path;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let mounts: Vec<FsMount> = words.split(|word| word == "--").filter_map(serve).collect();
    while mounts.iter().all(FsMount::is_running) {
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

fn serve(words: &[String]) -> Option<FsMount> {
    let [socket, tag, source, options @ ..] = words else {
        eprintln!("usage: serve_fs SOCKET TAG SOURCE [OPTION...]");
        return None;
    };
    let mut share = Share::new(source);
    for option in options {
        match option.as_str() {
            "system" => share = Share::system(&[Path::new(source)]),
            "ro" => share = share.read_only(),
            "none" => share.cache = Cache::None,
            "always" => share.cache = Cache::Always,
            "writeback" => share.writeback = true,
            "devices" => share.devices = true,
            other => eprintln!("{other}: no such option"),
        }
    }
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket).inspect_err(|error| eprintln!("{socket}: {error}")).ok()?;
    FsMount::serve(Source::Listener(listener), tag, share).inspect_err(|error| eprintln!("{error}")).ok()
}
