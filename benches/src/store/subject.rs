//! What is measured: a program that saves a directory of images and gives them back.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::System;

/// Where a subject finds and leaves things. All of it is on one file system.
#[derive(Clone, Debug)]
pub struct Place {
    /// The directory with the images and nothing else.
    pub images: PathBuf,
    /// The store; what is in it counts as stored.
    pub store: PathBuf,
    /// What a program keeps beside its store, such as caches.
    pub home: PathBuf,
    /// An empty directory for loaded images.
    pub loaded: PathBuf,
}

/// A program at one of its settings. Each step is a list of commands that run one after the other.
pub trait Subject {
    /// Whose it is.
    fn system(&self) -> System;

    /// How it is set, in a few words.
    fn setting(&self) -> &str;

    /// Whether once is enough: it is far from the fastest, and there for its size or to be complete.
    fn once(&self) -> bool {
        false
    }

    /// Makes an empty store.
    fn create(&self, place: &Place) -> Vec<Command>;

    /// Saves all images and calls them `name`. Reads every byte, whatever it knows of the files.
    fn save(&self, place: &Place, name: &str) -> Vec<Command>;

    /// Loads all images that were saved as `name`.
    fn load(&self, place: &Place, name: &str) -> Vec<Command>;

    /// Loads one of them.
    fn load_one(&self, place: &Place, name: &str, image: &str) -> Vec<Command>;
}

impl Place {
    /// Directories with these names in `directory`, empty but for the images.
    ///
    /// # Errors
    ///
    /// When they cannot be made.
    pub fn in_directory(directory: &Path) -> Result<Self> {
        let place = Self {
            images: directory.join("images"),
            store: directory.join("store"),
            home: directory.join("home"),
            loaded: directory.join("loaded"),
        };
        place.clear()?;
        std::fs::create_dir_all(&place.images).context("cannot make a directory")?;
        Ok(place)
    }

    /// Removes everything but the images.
    ///
    /// # Errors
    ///
    /// When it cannot be removed.
    pub fn clear(&self) -> Result<()> {
        self.clear_loaded()?;
        for directory in [&self.store, &self.home] {
            empty(directory)?;
        }
        Ok(())
    }

    /// Removes what was loaded.
    ///
    /// # Errors
    ///
    /// When it cannot be removed.
    pub fn clear_loaded(&self) -> Result<()> {
        empty(&self.loaded)
    }

    /// A command of `program` that is sure to find nothing of the user's settings.
    pub(super) fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        command
            .env("HOME", &self.home)
            .env("XDG_CACHE_HOME", self.home.join("cache"))
            .env("XDG_CONFIG_HOME", self.home.join("config"))
            .current_dir(&self.images);
        command
    }
}

fn empty(directory: &Path) -> Result<()> {
    let context = || format!("cannot empty {}", directory.display());
    if directory.exists() {
        std::fs::remove_dir_all(directory).with_context(context)?;
    }
    std::fs::create_dir_all(directory).with_context(context)
}

/// Runs `commands` one after the other.
///
/// # Errors
///
/// With what a program said when it did not succeed.
pub(super) fn run(commands: Vec<Command>) -> Result<()> {
    for mut command in commands {
        let program = command.get_program().to_string_lossy().into_owned();
        let output = command
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("cannot run {program}"))?;
        if !output.status.success() {
            bail!(
                "{command:?} failed: {}\n{}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
        }
    }
    Ok(())
}
