//! borg, as Debian has it, without encryption.

use std::process::Command;

use super::{Place, Subject};
use crate::System;

/// borg at one of its ways of cutting and compressing.
#[derive(Debug)]
pub struct Borg {
    setting: &'static str,
    chunker: &'static str,
    compression: &'static str,
    once: bool,
}

impl Borg {
    /// Those that serve images of machines best: by size, and by speed with less and less compression.
    pub const ALL: [Self; 5] = [
        Self {
            setting: "zstd-9, CDC 16 KiB",
            chunker: "buzhash,12,16,14,4095",
            compression: "zstd,9",
            once: true,
        },
        Self {
            setting: "zstd-1, CDC 16 KiB",
            chunker: "buzhash,12,16,14,4095",
            compression: "zstd,1",
            once: true,
        },
        Self {
            setting: "zstd-1, fixed 64 KiB",
            chunker: "fixed,65536",
            compression: "zstd,1",
            once: false,
        },
        Self {
            setting: "lz4, fixed 64 KiB",
            chunker: "fixed,65536",
            compression: "lz4",
            once: false,
        },
        Self {
            setting: "raw, fixed 1 MiB",
            chunker: "fixed,1048576",
            compression: "none",
            once: false,
        },
    ];

    fn command(place: &Place, arguments: &[&str]) -> Command {
        let mut borg = place.command("borg");
        borg.env("BORG_REPO", &place.store)
            .env("BORG_BASE_DIR", &place.home)
            .env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes")
            .args(arguments);
        borg
    }
}

impl Subject for Borg {
    fn system(&self) -> System {
        System::Borg
    }

    fn setting(&self) -> &str {
        self.setting
    }

    fn once(&self) -> bool {
        self.once
    }

    fn create(&self, place: &Place) -> Vec<Command> {
        vec![Self::command(place, &["init", "--encryption", "none"])]
    }

    fn save(&self, place: &Place, name: &str) -> Vec<Command> {
        // With its cache of files it does not read those whose times are known.
        let mut save = Self::command(place, &["create", "--files-cache", "disabled"]);
        save.args(["--compression", self.compression])
            .args(["--chunker-params", self.chunker])
            .args([&format!("::{name}"), "."]);
        vec![save]
    }

    fn load(&self, place: &Place, name: &str) -> Vec<Command> {
        let mut load = Self::command(place, &["extract", "--sparse"]);
        load.arg(format!("::{name}")).current_dir(&place.loaded);
        vec![load]
    }

    fn load_one(&self, place: &Place, name: &str, image: &str) -> Vec<Command> {
        let mut load = Self::command(place, &["extract", "--sparse"]);
        load.arg(format!("::{name}"))
            .arg(image)
            .current_dir(&place.loaded);
        vec![load]
    }
}
