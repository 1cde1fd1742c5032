//! casync, as Debian has it: content-defined chunks, a file each.

use std::path::Path;
use std::process::Command;

use super::{Place, Subject};
use crate::System;

/// casync at one size of chunks.
#[derive(Debug)]
pub struct Casync {
    setting: &'static str,
    chunk_bytes: &'static str,
}

impl Casync {
    /// Its default, and a size nearer to pages.
    pub const ALL: [Self; 2] = [
        Self {
            setting: "zstd, CDC 64 KiB",
            chunk_bytes: "65536",
        },
        Self {
            setting: "zstd, CDC 16 KiB",
            chunk_bytes: "16384",
        },
    ];

    fn command(place: &Place, verb: &str, arguments: [&Path; 2]) -> Command {
        let mut casync = place.command("casync");
        casync
            .arg("--store")
            .arg(place.store.join("chunks.castr"))
            .arg(verb)
            .args(arguments);
        casync
    }

    fn index(place: &Place, name: &str, image: &str) -> std::path::PathBuf {
        place.store.join(format!("{name}-{image}.caibx"))
    }
}

/// The names of the images, which a command per image needs.
fn images(place: &Place) -> Vec<String> {
    let entries = std::fs::read_dir(&place.images).into_iter().flatten();
    let mut names: Vec<_> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    names.sort_unstable();
    names
}

impl Subject for Casync {
    fn system(&self) -> System {
        System::Casync
    }

    fn setting(&self) -> &str {
        self.setting
    }

    fn once(&self) -> bool {
        true
    }

    fn create(&self, _: &Place) -> Vec<Command> {
        Vec::new()
    }

    fn save(&self, place: &Place, name: &str) -> Vec<Command> {
        let one = |image: String| {
            let index = Self::index(place, name, &image);
            let mut save = Self::command(place, "make", [&index, Path::new(&image)]);
            save.args(["--compression", "zstd", "--chunk-size", self.chunk_bytes]);
            save
        };
        images(place).into_iter().map(one).collect()
    }

    fn load(&self, place: &Place, name: &str) -> Vec<Command> {
        let images = images(place).into_iter();
        images
            .flat_map(|image| self.load_one(place, name, &image))
            .collect()
    }

    fn load_one(&self, place: &Place, name: &str, image: &str) -> Vec<Command> {
        let index = Self::index(place, name, image);
        let target = place.loaded.join(image);
        vec![Self::command(place, "extract", [&index, &target])]
    }
}
