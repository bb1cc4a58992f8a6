//! Mounts a directory by the file service until it is unmounted: `mount SOURCE TARGET [ro] [none|auto|always] [writeback]
//! [passthrough] [system] [devices] [suid] [threads=N]`.

use kso_files::mount::{MountOptions, mount};
use kso_files::{Cache, Share};
use std::path::Path;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [source, target, options @ ..] = words.as_slice() else {
        eprintln!("usage: mount SOURCE TARGET [OPTION...]");
        std::process::exit(2);
    };
    let mut share = Share::new(source);
    if options.iter().any(|option| option == "system") {
        share = Share::system(&[Path::new(source)]);
    }
    let mut mounting = MountOptions { passthrough: false, ..MountOptions::default() };
    for option in options {
        match option.as_str() {
            "ro" => share = share.read_only(),
            "none" => share.cache = Cache::None,
            "auto" => share.cache = Cache::Auto,
            "always" => share.cache = Cache::Always,
            "writeback" => share.writeback = true,
            "passthrough" => mounting.passthrough = true,
            "devices" => share.devices = true,
            "suid" => mounting.no_privilege = false,
            other => {
                if let Some(threads) = other.strip_prefix("threads=").and_then(|text| text.parse().ok()) {
                    mounting.threads = threads;
                }
            }
        }
    }
    match mount(share, Path::new(target), mounting) {
        Ok(mounted) => mounted.wait(),
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(1);
        }
    }
}
