//! `[kernel.NAME]` and `[[route]]`: external kernels, and which of them serves what.
//!
//! A route is written in parts here and in one line with `--via`; both are read by [`Route::parse`].

use super::{ConfigError, line_of};
use crate::kernels::{self, KernelSpec, Settings};
use crate::routes::{HOST, Route, RouteError, Routes};
use serde::Deserialize;
use std::collections::BTreeMap;
use toml::Spanned;

/// Marks between the parts of a route in one line: none of them belongs into a part.
const MARKS: [char; 6] = ['+', ':', '@', '%', '=', ','];

/// A `[[route]]`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RouteSection {
    services: Spanned<Vec<String>>,
    ports: Option<String>,
    network: Option<String>,
    program: Option<String>,
    strategy: Option<String>,
    kernels: Vec<String>,
}

impl RouteSection {
    /// As `--via` has it.
    fn line(&self) -> String {
        let mut line = self.services.get_ref().join("+");
        for (mark, part) in [(':', &self.ports), ('@', &self.network), ('%', &self.program)] {
            if let Some(part) = part {
                line.push(mark);
                line.push_str(part);
            }
        }
        line.push('=');
        if let Some(strategy) = &self.strategy {
            line.push_str(strategy);
            line.push(':');
        }
        line + &self.kernels.join(",")
    }

    /// A part that would be taken for two.
    fn strange(&self) -> Option<&String> {
        let one = |part: &&String| part.contains(MARKS);
        // An IPv6 network has colons, and stands behind the ports; a program's name may have anything that ends nothing.
        let network = self.network.iter().find(|part| part.contains(['@', '%', '=']));
        let program = self.program.iter().find(|part| part.contains('='));
        let parts = self.ports.iter().chain(&self.strategy);
        let lists = self.services.get_ref().iter().chain(&self.kernels);
        network.or(program).or_else(|| parts.chain(lists).find(one))
    }

    fn check(self, text: &str) -> Result<Route, ConfigError> {
        let line = line_of(text, self.services.span());
        if let Some(part) = self.strange() {
            return Err(ConfigError::RoutePart { line, part: part.clone() });
        }
        Route::parse(&self.line()).map_err(|error: RouteError| ConfigError::Route { line, error })
    }
}

/// The kernels and routes of a configuration. A route's kernel that has no section is one that is called as its make.
pub(super) fn check(
    text: &str,
    sections: BTreeMap<String, Settings>,
    routes: Vec<RouteSection>,
) -> Result<(Vec<KernelSpec>, Vec<Route>), ConfigError> {
    let mut kernels = kernels::all(sections)?;
    let routes: Vec<Route> = routes.into_iter().map(|route| route.check(text)).collect::<Result<_, _>>()?;
    for name in Routes::new(routes.clone()).kernels() {
        if name != HOST && kernels.iter().all(|known| known.name != name) {
            kernels.push(KernelSpec::parse(name)?);
        }
    }
    Ok((kernels, routes))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::Config;
    use super::*;
    use crate::kernels::Make;

    #[test]
    fn a_route_in_parts_is_the_route_in_one_line() {
        let text = "[kernel.web]\nmake = \"gvisor\"\n\
            [[route]]\nservices = [\"tcp-connect\", \"udp\"]\nports = \"1-1023\"\nnetwork = \"2001:db8::/32\"\n\
            program = \"nginx\"\nstrategy = \"shuffle/5\"\nkernels = [\"web\", \"gvisor\"]\n\
            [[route]]\nservices = [\"*\"]\nkernels = [\"host\"]\n";
        let config = Config::parse(text).unwrap();
        let lines = ["tcp-connect+udp:1-1023@2001:db8::/32%nginx=shuffle/5:web,gvisor", "*=host"];
        assert_eq!(config.routes, lines.map(|line| Route::parse(line).unwrap()));
        let kernels: Vec<_> = config.kernels.iter().map(|one| (one.name.as_str(), one.make)).collect();
        assert_eq!(
            kernels,
            [("web", Make::Gvisor), ("gvisor", Make::Gvisor)],
            "a name that is a make is enough"
        );
    }

    #[test]
    fn errors_show_the_place() {
        for (text, places) in [
            ("[[route]]\nservices = [\"http\"]\nkernels = [\"host\"]", &["line 2", "a service is"][..]),
            ("\n[[route]]\nservices = [\"tcp\"]\nkernels = []", &["line 3", "name of a kernel"]),
            ("[[route]]\nservices = [\"tcp:80\"]\nkernels = [\"host\"]", &["line 2", "`tcp:80`"]),
            ("[[route]]\nservices = [\"tcp\"]\nkernels = [\"linux\"]", &["kernel `linux`", "no make"]),
            ("[[route]]\nkernels = [\"host\"]", &["line 1", "services"]),
            ("[kernel.x]\nmake = \"provider\"", &["kernel `x`", "path"]),
            ("[kernel.x]\ncolour = 1", &["line 2", "colour"]),
        ] {
            let error = Config::parse(text).unwrap_err().to_string();
            for part in places {
                assert!(error.contains(part), "{part}: {text}: {error}");
            }
        }
    }
}
