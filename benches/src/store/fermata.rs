//! fermata's store: the crate `dedup`, in a process of its own as the others are.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use clap::Subcommand;
use dedup::{CreateOptions, DEFAULT_LEVEL, OpenOptions, Store};

use super::{Place, Subject};
use crate::System;

/// The store at one of its settings.
#[derive(Debug)]
pub struct Fermata {
    program: PathBuf,
    level: i32,
    setting: &'static str,
    once: bool,
}

/// The store's levels, as zstd counts them, and what a table calls them.
pub const SETTINGS: [(i32, &str); 3] = [
    (DEFAULT_LEVEL, "zstd 1, 4 KiB"),
    (-10, "zstd -10, 4 KiB"),
    (0, "raw, 4 KiB"),
];

/// The smallest that the store becomes, and how long that takes is not the point: once is enough.
pub const SMALLEST: (i32, &str) = (19, "zstd 19, 4 KiB");

/// What the program that has the library in it is asked for.
#[derive(Debug, Subcommand)]
pub enum Task {
    /// Make an empty store
    Create {
        /// Its directory
        store: PathBuf,
        /// How hard it compresses
        #[arg(long, allow_negative_numbers = true)]
        level: i32,
    },
    /// Save the files of a directory as images of one snapshot
    Save {
        /// The store's directory
        store: PathBuf,
        /// The snapshot's name
        name: String,
        /// Files
        images: PathBuf,
    },
    /// Load all images of a snapshot
    Load {
        /// The store's directory
        store: PathBuf,
        /// Its name
        name: String,
        /// Directory for the files
        loaded: PathBuf,
    },
    /// Load one image of a snapshot
    LoadOne {
        /// The store's directory
        store: PathBuf,
        /// The snapshot's name
        name: String,
        /// The image's
        image: String,
        /// The file
        file: PathBuf,
    },
}

impl Fermata {
    /// The store at its settings, run by this program, which must do a [`Task`] when called with `task`.
    ///
    /// # Errors
    ///
    /// When this program's path is not known.
    pub fn all() -> Result<Vec<Self>> {
        let program = std::env::current_exe().context("cannot tell this program's path")?;
        let at = |once| {
            let program = &program;
            move |(level, setting)| Self {
                program: program.clone(),
                level,
                setting,
                once,
            }
        };
        let smallest = std::iter::once(SMALLEST).map(at(true));
        Ok(SETTINGS
            .into_iter()
            .map(at(false))
            .chain(smallest)
            .collect())
    }

    fn command(&self, place: &Place, task: &str) -> Command {
        let mut command = place.command(&self.program);
        command.args(["task", task]).arg(&place.store);
        command
    }
}

impl Subject for Fermata {
    fn system(&self) -> System {
        System::Fermata
    }

    fn setting(&self) -> &'static str {
        self.setting
    }

    fn once(&self) -> bool {
        self.once
    }

    fn create(&self, place: &Place) -> Vec<Command> {
        let mut create = self.command(place, "create");
        create.args(["--level", &self.level.to_string()]);
        vec![create]
    }

    fn save(&self, place: &Place, name: &str) -> Vec<Command> {
        let mut save = self.command(place, "save");
        save.arg(name).arg(&place.images);
        vec![save]
    }

    fn load(&self, place: &Place, name: &str) -> Vec<Command> {
        let mut load = self.command(place, "load");
        load.arg(name).arg(&place.loaded);
        vec![load]
    }

    fn load_one(&self, place: &Place, name: &str, image: &str) -> Vec<Command> {
        let mut load = self.command(place, "load-one");
        load.args([name, image]).arg(place.loaded.join(image));
        vec![load]
    }
}

impl Task {
    /// Does it.
    ///
    /// # Errors
    ///
    /// When the store or a file says no.
    pub fn run(&self) -> Result<()> {
        let open = |store: &Path| Store::open_dir(store, OpenOptions::default());
        match self {
            Self::Create { store, level } => {
                let create = CreateOptions {
                    level: *level,
                    ..CreateOptions::default()
                };
                Store::create_dir(store, &create, OpenOptions::default())?;
            }
            Self::Save {
                store,
                name,
                images,
            } => {
                let mut writer = open(store)?.writer(name, None)?;
                let paths = super::pages::files(images)?;
                let names: Vec<_> = paths
                    .iter()
                    .map(|path| path.file_name().unwrap_or_default().to_string_lossy())
                    .collect();
                let named = names.iter().zip(&paths);
                let files: Vec<_> = named
                    .map(|(name, path)| (&**name, path.as_path()))
                    .collect();
                writer.images_from_files(&files)?;
                writer.commit()?;
            }
            Self::Load {
                store,
                name,
                loaded,
            } => {
                let store = open(store)?;
                let snapshot = store.snapshot(name)?;
                for image in snapshot.images() {
                    snapshot.image(image)?.load_file(&loaded.join(image))?;
                }
            }
            Self::LoadOne {
                store,
                name,
                image,
                file,
            } => open(store)?.image(name, image)?.load_file(file)?,
        }
        Ok(())
    }
}
