//! restic, as Debian has it: content-defined chunks of about a megabyte, always encrypted.

use std::process::Command;

use super::{Place, Subject};
use crate::System;

/// restic at its defaults, which are the fastest that it has.
#[derive(Debug)]
pub struct Restic;

impl Restic {
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

    fn setting(&self) -> &'static str {
        "zstd auto, CDC 1 MiB"
    }

    fn create(&self, place: &Place) -> Vec<Command> {
        vec![Self::command(place, &["init"])]
    }

    fn save(&self, place: &Place, name: &str) -> Vec<Command> {
        // Without --force it does not read files whose times are known.
        let arguments = ["backup", "--force", "--tag", name, "."];
        vec![Self::command(place, &arguments)]
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
