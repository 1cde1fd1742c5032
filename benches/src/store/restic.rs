//! restic, as Debian has it: content-defined chunks of about a megabyte, always encrypted.

use std::process::Command;

use super::{Place, Subject};
use crate::System;

/// restic, which cuts in one way, and compresses or does not.
#[derive(Debug)]
pub struct Restic {
    setting: &'static str,
    compression: &'static str,
}

impl Restic {
    /// Its default, as small as it can, and without compression.
    pub const ALL: [Self; 3] = [
        Self {
            setting: "zstd auto, CDC 1 MiB",
            compression: "auto",
        },
        Self {
            setting: "zstd max, CDC 1 MiB",
            compression: "max",
        },
        Self {
            setting: "raw, CDC 1 MiB",
            compression: "off",
        },
    ];

    fn command(place: &Place, arguments: &[&str]) -> Command {
        let mut restic = place.command("restic");
        restic
            .env("RESTIC_REPOSITORY", &place.store)
            .env("RESTIC_PASSWORD", "bench")
            .arg("--quiet")
            .args(arguments);
        restic
    }
}

impl Subject for Restic {
    fn system(&self) -> System {
        System::Restic
    }

    fn setting(&self) -> &str {
        self.setting
    }

    fn once(&self) -> bool {
        true
    }

    fn create(&self, place: &Place) -> Vec<Command> {
        vec![Self::command(place, &["init"])]
    }

    fn save(&self, place: &Place, name: &str) -> Vec<Command> {
        // Without --force it does not read files whose times are known.
        let mut save = Self::command(place, &["backup", "--force", "--tag", name, "."]);
        save.args(["--compression", self.compression]);
        vec![save]
    }

    fn load(&self, place: &Place, name: &str) -> Vec<Command> {
        let mut load = Self::command(place, &["restore", "latest", "--tag", name, "--target"]);
        load.arg(&place.loaded);
        vec![load]
    }

    fn load_one(&self, place: &Place, name: &str, image: &str) -> Vec<Command> {
        let mut load = Self::command(place, &["restore", "latest", "--tag", name, "--target"]);
        load.arg(&place.loaded).args(["--include", image]);
        vec![load]
    }
}
