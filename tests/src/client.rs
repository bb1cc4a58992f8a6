//! Which client kernel the programs run on: `KSO_TEST_CLIENT`.

use std::sync::OnceLock;
use std::time::Duration;

/// A client kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Client {
    /// A sandbox of this host's kernel: `kso run`. The default, or `sandbox`.
    Sandbox,
    /// A microVM: `kso vm`. `vm`, or `vm:KERNEL` for one of `kso kernels`.
    Guest {
        /// `--kernel`.
        kernel: Option<String>,
    },
}

impl Client {
    /// The one that is tested.
    pub fn current() -> &'static Self {
        static CURRENT: OnceLock<Client> = OnceLock::new();
        CURRENT.get_or_init(|| {
            let wanted = std::env::var("KSO_TEST_CLIENT").unwrap_or_default();
            match wanted.split_once(':') {
                None if wanted.is_empty() || wanted == "sandbox" => Self::Sandbox,
                None if wanted == "vm" => Self::Guest { kernel: None },
                Some(("vm", kernel)) => Self::Guest { kernel: Some(kernel.to_owned()) },
                _ => panic!("KSO_TEST_CLIENT={wanted}: sandbox, vm or vm:KERNEL"),
            }
        })
    }

    /// The microVM that is tested, or else the one whose kernel is this system's own kind.
    pub fn guest() -> Self {
        match Self::current() {
            Self::Sandbox => Self::Guest { kernel: Some("6.1".to_owned()) },
            guest @ Self::Guest { .. } => guest.clone(),
        }
    }

    /// Whether it is a microVM.
    pub fn is_guest(&self) -> bool {
        matches!(self, Self::Guest { .. })
    }

    /// A program may take so long where it would take `native` on this host: an emulated guest boots first, and is
    /// slower.
    pub fn patience(&self, native: Duration) -> Duration {
        match self {
            Self::Sandbox => native,
            Self::Guest { .. } => native * 5 + Duration::from_secs(20),
        }
    }

    /// The words before the program. `shared` directories are the same on both sides.
    pub fn words(&self, kso: &str, flags: &str, shared: &[String]) -> Vec<String> {
        let mut words = vec![kso.to_owned()];
        match self {
            Self::Sandbox => words.push("run".to_owned()),
            Self::Guest { kernel } => {
                words.push("vm".to_owned());
                if let Some(kernel) = kernel {
                    words.extend(["--kernel".to_owned(), kernel.clone()]);
                }
                for directory in shared {
                    words.extend(["-v".to_owned(), format!("{directory}:{directory}")]);
                }
            }
        }
        words.extend(flags.split_whitespace().map(str::to_owned));
        words.push("--".to_owned());
        words
    }
}
