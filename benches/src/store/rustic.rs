//! rustic, built by cargo: restic's format, cut in more ways, always encrypted.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Place, Subject};
use crate::System;

const FIXED: &str = "--set-chunker=fixed_size";
const SIZE: &str = "--set-chunk-size";

/// rustic at one of its ways of cutting and compressing.
#[derive(Debug)]
pub struct Rustic {
    program: PathBuf,
    setting: &'static str,
    /// How a repository is made with it.
    create: &'static [&'static str],
    once: bool,
}

impl Rustic {
    /// `program` at each of its settings: by size, and by speed.
    pub fn all(program: &Path) -> Vec<Self> {
        let at = |setting, once, create| Self {
            program: program.to_owned(),
            setting,
            create,
            once,
        };
        vec![
            at("zstd-3, fixed 4 KiB", true, &["3", FIXED, SIZE, "4kiB"]),
            at("zstd-1, fixed 4 KiB", true, &["1", FIXED, SIZE, "4kiB"]),
            at("zstd-1, fixed 64 KiB", false, &["1", FIXED, SIZE, "64kiB"]),
            at("zstd-1, CDC 1 MiB", false, &["1"]),
            at("raw, CDC 1 MiB", false, &["0"]),
            at("raw, fixed 1 MiB", false, &["0", FIXED, SIZE, "1MiB"]),
        ]
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

    fn once(&self) -> bool {
        self.once
    }

    fn create(&self, place: &Place) -> Vec<Command> {
        let mut init = self.command(place, &["init", "--set-compression"]);
        init.args(self.create);
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
