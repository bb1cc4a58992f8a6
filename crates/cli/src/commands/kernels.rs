//! `kso kernels`: what guests can run, and the external kernels of running brokers.

mod external;

use crate::output;
use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use external::External;
use kso_vm::Kernel;
use kso_vm::kernels::{self, Origin};
use std::fmt::Write as _;
use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::time::SystemTime;

const EXAMPLES: &str = "\
Examples:
  kso kernels                  what guests can run (* is what kso vm takes), and the external kernels of running brokers
  kso kernels --json | jq '.external[] | select(.state != \"up\")'
  kso kernels fetch            the kernel for virtual machines of this system's own Debian release
  kso kernels fetch 6.12       of another release: 5.10, 6.1, 6.12, 7.2, or bookworm, trixie, sid ...
  kso vm --kernel 6.12 -- CMD  run it

Kernels are fetched by apt from the mirror in the system's own sources, its signatures are checked, and they are unpacked
into $XDG_CACHE_HOME/kso/kernels (~/.cache/kso/kernels): nothing is installed, and no root is needed.

External kernels perform sockets and files for programs of another (kso run --kernel, --via, [kernel.NAME] in kso.toml).
States: idle (no route names it), starting, up, draining, down (it is started again), aside (it died too often).
kso doctor says which makes can run here.";

/// Options of `kso kernels`.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
pub struct KernelsArgs {
    #[command(subcommand)]
    command: Option<KernelsCommand>,

    /// One JSON document instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand, Debug)]
enum KernelsCommand {
    /// Fetch Debian's newest kernel of a version or release into the cache
    Fetch {
        /// A version (5.10, 6.1, 6.12, 7.2) or a release of Debian; by default this system's own
        #[arg(value_name = "VERSION|RELEASE")]
        wanted: Option<String>,
    },
}

/// Lists or fetches.
///
/// # Errors
/// See [`kernels::FetchError`].
pub fn run(args: KernelsArgs) -> Result<ExitCode> {
    output::init_logs(0);
    let text = match args.command {
        Some(KernelsCommand::Fetch { wanted }) => {
            let kernel = kernels::fetch(wanted.as_deref(), |what| eprintln!("kso: {what}"))?;
            format!("{}\n", kernel.release)
        }
        None if args.json => json(&kernels::list(), &external::all())?,
        None => {
            let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            table(&kernels::list()) + &external::table(&external::all(), colour, SystemTime::now())
        }
    };
    // A closed pipe is no error of ours.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(ExitCode::SUCCESS)
}

fn table(kernels: &[Kernel]) -> String {
    if kernels.is_empty() {
        return "no kernels: fetch Debian's with 'kso kernels fetch'\n".into();
    }
    let width = kernels.iter().map(|kernel| kernel.release.len()).max().unwrap_or_default();
    let mut text = String::new();
    for (index, kernel) in kernels.iter().enumerate() {
        let (mark, image) = (if index == 0 { '*' } else { ' ' }, kernel.image.display());
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{mark} {:width$}  {:6}  {image}", kernel.release, kernel.origin.name());
    }
    text
}

fn json(kernels: &[Kernel], external: &[External]) -> Result<String> {
    let kernels: Vec<_> = kernels
        .iter()
        .enumerate()
        .map(|(index, kernel)| {
            serde_json::json!({
                "release": kernel.release,
                "image": kernel.image,
                "modules": kernel.modules,
                "cached": kernel.origin == Origin::Cache,
                "default": index == 0,
            })
        })
        .collect();
    let text = serde_json::to_string_pretty(&serde_json::json!({ "kernels": kernels, "external": external }));
    Ok(format!("{}\n", text.context("a path is not UTF-8")?))
}
