//! The command line, as its users have it.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::programs;

/// The status of a Rust program that has panicked.
const PANICKED: i32 = 101;

/// Runs `fermata` in a directory, with a run directory and a store of its own.
#[derive(Clone, Debug)]
pub struct Cli {
    directory: PathBuf,
    run_directory: PathBuf,
}

impl Cli {
    /// In `directory`, where its store will be, with the machines of `run_directory`.
    #[must_use]
    pub fn new(directory: &Path, run_directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
            run_directory: run_directory.to_owned(),
        }
    }

    /// The store's directory.
    #[must_use]
    pub fn store(&self) -> PathBuf {
        self.directory.join("store")
    }

    /// The command, not yet started.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(programs::fermata());
        command
            .args(arguments)
            .current_dir(&self.directory)
            .env("FERMATA_RUN_DIR", &self.run_directory)
            .env("FERMATA_STORE", self.store())
            .env("FERMATA_VMM_BIN", programs::vmm());
        command
    }

    /// Runs a command that succeeds, and returns what it prints.
    ///
    /// # Errors
    ///
    /// When it fails; with what it said.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        let Output {
            status,
            stdout,
            stderr,
        } = self.command(arguments).output()?;
        let said = String::from_utf8_lossy(&stderr);
        ensure!(status.success(), "fermata {arguments:?}: {status}: {said}");
        Ok(String::from_utf8(stdout)?)
    }

    /// Runs a command that succeeds, and returns the JSON that it prints.
    ///
    /// # Errors
    ///
    /// When it fails or prints something else.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let printed = self.run(arguments)?;
        serde_json::from_str(&printed).with_context(|| format!("{arguments:?} printed {printed}"))
    }

    /// Runs a command that fails, and returns what it says.
    ///
    /// # Errors
    ///
    /// When it succeeds, says nothing, or does not fail by its own decision: by a panic or a signal.
    pub fn refused(&self, arguments: &[&str]) -> Result<String> {
        let Output { status, stderr, .. } = self.command(arguments).output()?;
        let said = String::from_utf8_lossy(&stderr).into_owned();
        let decided = matches!(status.code(), Some(code) if code != 0 && code != PANICKED);
        ensure!(
            decided && !said.is_empty(),
            "fermata {arguments:?}: {status}: {said}"
        );
        Ok(said)
    }
}
