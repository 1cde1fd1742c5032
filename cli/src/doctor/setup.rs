//! Whether fermata itself is in order.

use std::{
    env,
    path::{Path, PathBuf},
};

use control::Registry;

use super::{Finding, Host};
use crate::program;

const RUN_DIR: &str = "run directory";
const PROGRAM: &str = "VMM program";

/// Who is logged in, as far as the environment says.
pub(super) struct Login {
    user: Option<String>,
    /// What is there for as long as the user is logged in.
    runtime_dir: Option<PathBuf>,
}

impl Login {
    pub(super) fn of_environment() -> Self {
        Self {
            user: env::var("USER").ok(),
            runtime_dir: env::var_os("XDG_RUNTIME_DIR")
                .filter(|dir| !dir.is_empty())
                .map(PathBuf::from),
        }
    }

    /// Whether `dir` goes when the user logs out.
    fn ends(&self, dir: &Path, host: &Host) -> bool {
        let (Some(user), Some(runtime_dir)) = (&self.user, &self.runtime_dir) else {
            return false;
        };
        let lingers = host.path("var/lib/systemd/linger").join(user).exists();
        !lingers && dir.starts_with(runtime_dir)
    }
}

/// Whether machines can be written down.
pub(super) fn run_dir(dir: &Path, host: &Host, login: &Login) -> Finding {
    let shown = dir.display().to_string();
    let opened = Registry::open(dir).and_then(|registry| Ok((registry.list()?, registry)));
    match opened {
        Ok((records, registry)) => {
            let found = format!("{shown}, {} machines", records.len());
            if login.ends(registry.dir(), host) {
                Finding::warn(
                    RUN_DIR,
                    format!("{found}; it goes at logout, and who lives on is not found any more"),
                    "`loginctl enable-linger` keeps it, or name another by --run-dir",
                )
            } else {
                Finding::ok(RUN_DIR, found)
            }
        }
        Err(error) => Finding::fail(RUN_DIR, shown, error.to_string()),
    }
}

/// Whether there is a program that runs them.
pub(super) fn program() -> Finding {
    match program::find() {
        Ok(path) => Finding::ok(PROGRAM, path.display().to_string()),
        Err(error) => Finding::fail(PROGRAM, "not found", error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Verdict, host::fake::Fake},
        *,
    };

    #[test]
    fn a_run_directory_that_goes_at_logout_is_told_of() {
        let dir = tempfile::tempdir().unwrap();
        let verdict = |run_dir: &str, lingers: &[(&str, &str)]| {
            let login = Login {
                user: Some("me".to_owned()),
                runtime_dir: Some(dir.path().join("user")),
            };
            let host = Fake::new(lingers);
            super::run_dir(&dir.path().join(run_dir), &host.host(), &login).verdict
        };
        let lingers = [("var/lib/systemd/linger/me", "")];
        assert_eq!(verdict("user/fermata", &[]), Verdict::Warn);
        assert_eq!(verdict("user/fermata", &lingers), Verdict::Ok);
        assert_eq!(verdict("fermata", &[]), Verdict::Ok);
    }
}
