//! fermata's store: the crate `dedup`, in a process of its own as the others are.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use clap::Subcommand;
use dedup::{CreateOptions, OpenOptions, Store};

use super::{Place, Subject};
use crate::System;

/// The store at its defaults.
#[derive(Debug)]
pub struct Fermata {
    program: PathBuf,
}

/// What the program that has the library in it is asked for.
#[derive(Debug, Subcommand)]
pub enum Task {
    /// Make an empty store
    Create {
        /// Its directory
        store: PathBuf,
    },
    /// Save each file of a directory as a snapshot
    Save {
        /// The store's directory
        store: PathBuf,
        /// The snapshots' names begin with this
        name: String,
        /// Files
        images: PathBuf,
    },
    /// Load each snapshot whose name begins so
    Load {
        /// The store's directory
        store: PathBuf,
        /// What the names begin with
        name: String,
        /// Directory for the files
        loaded: PathBuf,
    },
    /// Load one snapshot
    LoadOne {
        /// The store's directory
        store: PathBuf,
        /// Its name
        name: String,
        /// The file
        file: PathBuf,
    },
}

impl Fermata {
    /// The store, run by this program, which must do a [`Task`] when called with `task`.
    ///
    /// # Errors
    ///
    /// When this program's path is not known.
    pub fn new() -> Result<Self> {
        let program = std::env::current_exe().context("cannot tell this program's path")?;
        Ok(Self { program })
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
        "zstd-1, 4 KiB"
    }

    fn create(&self, place: &Place) -> Vec<Command> {
        vec![self.command(place, "create")]
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
        load.arg(snapshot(name, image))
            .arg(place.loaded.join(image));
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
            Self::Create { store } => {
                Store::create_dir(store, &CreateOptions::default(), OpenOptions::default())?;
            }
            Self::Save {
                store,
                name,
                images,
            } => {
                let store = open(store)?;
                for image in super::pages::files(images)? {
                    let file = image.file_name().unwrap_or_default().to_string_lossy();
                    store.save_file(&snapshot(name, &file), &image)?;
                }
            }
            Self::Load {
                store,
                name,
                loaded,
            } => {
                let store = open(store)?;
                for entry in store.log()? {
                    if let Some(image) = entry.name.strip_prefix(&format!("{name}-")) {
                        store.load_file(&entry.name, loaded.join(image))?;
                    }
                }
            }
            Self::LoadOne { store, name, file } => open(store)?.load_file(name, file)?,
        }
        Ok(())
    }
}

/// The name of an image's snapshot.
pub(super) fn snapshot(name: &str, image: &str) -> String {
    format!("{name}-{image}")
}
