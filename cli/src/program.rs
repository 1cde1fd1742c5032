//! Where the VMM program is.

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context, ensure};

const NAME: &str = "fermata-vmm";

/// Names the program, if set.
const VARIABLE: &str = "FERMATA_VMM_BIN";

/// The VMM program: `$FERMATA_VMM_BIN`, else beside this program, else on the path.
pub(crate) fn find() -> anyhow::Result<PathBuf> {
    if let Some(named) = env::var_os(VARIABLE).filter(|value| !value.is_empty()) {
        let named = std::path::absolute(named)?;
        ensure!(
            is_program(&named),
            "{VARIABLE} names {}, which is not a program; set it to where {NAME} is",
            named.display()
        );
        return Ok(named);
    }
    let beside = env::current_exe()
        .ok()
        .and_then(|own| Some(own.parent()?.to_owned()));
    let path = env::var_os("PATH").unwrap_or_default();
    search(beside.into_iter().chain(env::split_paths(&path))).with_context(|| {
        format!("{NAME} is neither beside fermata nor on the path; set {VARIABLE} to where it is")
    })
}

fn search(mut directories: impl Iterator<Item = PathBuf>) -> Option<PathBuf> {
    directories.find_map(|directory| {
        let candidate = directory.join(NAME);
        is_program(&candidate).then_some(candidate)
    })
}

fn is_program(path: &Path) -> bool {
    path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok()
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn the_first_directory_that_has_it_counts() {
        let dir = tempfile::tempdir().unwrap();
        let [none, text, program] = ["a", "b", "c"].map(|name| dir.path().join(name));
        for (directory, mode) in [(&text, 0o600), (&program, 0o700)] {
            fs::create_dir(directory).unwrap();
            let file = directory.join(NAME);
            fs::write(&file, "").unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
        }
        let found = search([none, text, program.clone()].into_iter());
        assert_eq!(found, Some(program.join(NAME)));
        assert_eq!(search([dir.path().to_owned()].into_iter()), None);
    }
}
