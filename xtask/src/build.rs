//! Building by cargo, and finding what it built.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use testbed::cache;

/// Programs and test programs, by the name of their target.
pub(crate) struct Programs(HashMap<String, PathBuf>);

impl Programs {
    /// The path of the program called `name`.
    pub(crate) fn path(&self, name: &str) -> Result<&Path> {
        let path = self
            .0
            .get(name)
            .with_context(|| format!("the workspace has no program {name}"))?;
        Ok(path)
    }
}

/// Cargo run on this workspace.
pub(crate) fn cargo(arguments: impl IntoIterator<Item: AsRef<OsStr>>) -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(cache::workspace())
        .args(arguments)
        .stdin(Stdio::null());
    cargo
}

/// The product's.
const PRODUCT: [&str; 2] = ["fermata", "fermata-vmm"];

/// Builds the product's programs with optimisation, and `others` of the workspace: each takes most of a minute.
pub(crate) fn release_programs(others: &[&str]) -> Result<Programs> {
    let wanted = PRODUCT.iter().chain(others);
    let wanted = wanted.flat_map(|name| ["--bin", name]);
    // Selected in the whole workspace, as the test programs are.
    let cargo = ["build", "--release", "--workspace"].into_iter();
    built_by(&cargo.chain(wanted).collect::<Vec<_>>())
}

/// Builds the tests of the workspace, and the test program `other`.
pub(crate) fn tests(other: &str) -> Result<()> {
    let all = ["--lib", "--bins", "--tests"];
    let cargo = ["test", "--no-run", "--workspace"].into_iter();
    built_by(
        &cargo
            .chain(all)
            .chain(["--test", other])
            .collect::<Vec<_>>(),
    )?;
    Ok(())
}

/// Builds the test program `name`, from what the other tests are built of. It is selected in the whole workspace and not in
/// its package, which would have dependencies built once more with fewer features.
pub(crate) fn system_test(name: &str) -> Result<Programs> {
    built_by(&["test", "--no-run", "--workspace", "--test", name])
}

fn built_by(arguments: &[&str]) -> Result<Programs> {
    let line = arguments.join(" ");
    let output = cargo(arguments)
        .args(["--quiet", "--message-format", "json-render-diagnostics"])
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    if !output.status.success() {
        bail!("cargo {line} failed");
    }
    parse(&String::from_utf8(output.stdout).context("cargo's messages are not UTF-8")?)
}

/// The part of cargo's messages that is of use here:
/// <https://doc.rust-lang.org/cargo/reference/external-tools.html#artifact-messages>.
#[derive(Deserialize)]
struct Message {
    target: Option<Target>,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

fn parse(messages: &str) -> Result<Programs> {
    let mut programs = HashMap::new();
    for line in messages.lines() {
        let message: Message =
            serde_json::from_str(line).context("cannot read cargo's messages")?;
        if let Message {
            target: Some(target),
            executable: Some(executable),
        } = message
        {
            programs.insert(target.name, executable);
        }
    }
    Ok(Programs(programs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_can_be_executed_is_listed() {
        let messages = concat!(
            r#"{"reason":"compiler-artifact","target":{"name":"vmm","kind":["lib"]},"executable":null}"#,
            "\n",
            r#"{"reason":"compiler-artifact","target":{"name":"fermata","kind":["bin"]},"executable":"/t/fermata"}"#,
            "\n",
            r#"{"reason":"build-finished","success":true}"#,
        );
        let programs = parse(messages).unwrap();
        assert_eq!(programs.path("fermata").unwrap(), Path::new("/t/fermata"));
        assert!(programs.path("vmm").is_err());
    }
}
