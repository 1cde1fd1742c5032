//! rustic, built by cargo: restic's format, cut in more ways, always encrypted.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Place, Subject};
use crate::System;

/// rustic at one of its ways of cutting.
#[derive(Debug)]
pub struct Rustic {
    program: PathBuf,
    setting: &'static str,
    chunker: &'static [&'static str],
}

/// Each setting, and how a repository is made with it.
const SETTINGS: [(&str, &[&str]); 3] = [
    ("zstd-1, CDC 1 MiB", &[]),
    (
        "zstd-1, fixed 64 KiB",
        &["--set-chunker", "fixed_size", "--set-chunk-size", "64kiB"],
    ),
    (
        "zstd-1, fixed 4 KiB",
        &["--set-chunker", "fixed_size", "--set-chunk-size", "4kiB"],
    ),
];

impl Rustic {
    /// `program` at each of its settings.
    pub fn all(program: &Path) -> Vec<Self> {
        let settings = SETTINGS.into_iter();
        settings
            .map(|(setting, chunker)| Self {
                program: program.to_owned(),
                setting,
                chunker,
            })
            .collect()
    }

    fn command(&self, place: &Place, arguments: &[&str]) -> Command {
        let mut rustic = place.command(&self.program);
        rustic
            .env("RUSTIC_REPOSITORY", &place.store)
            .env("RUSTIC_PASSWORD", "bench")
            .env("RUSTIC_NO_PROGRESS", "true")
            .args(["--log-level", "error", "--no-cache"])
            .args(arguments);
        rustic
    }
}

impl Subject for Rustic {
    fn system(&self) -> System {
        System::Rustic
    }

    fn setting(&self) -> &str {
        self.setting
    }

    fn create(&self, place: &Place) -> Vec<Command> {
        let mut init = self.command(place, &["init", "--set-compression", "1"]);
        init.args(self.chunker);
        vec![init]
    }

    fn save(&self, place: &Place, name: &str) -> Vec<Command> {
        // Without --force it does not read files whose times are known.
        vec![self.command(place, &["backup", "--force", "--label", name, "."])]
    }

    fn load(&self, place: &Place, name: &str) -> Vec<Command> {
        let mut load = self.command(place, &["restore", "--filter-label", name, "latest"]);
        load.arg(&place.loaded);
        vec![load]
    }

    fn load_one(&self, place: &Place, name: &str, image: &str) -> Vec<Command> {
        let snapshot = format!("latest:{image}");
        let mut load = self.command(place, &["restore", "--filter-label", name, &snapshot]);
        load.arg(place.loaded.join(image));
        vec![load]
    }
}
