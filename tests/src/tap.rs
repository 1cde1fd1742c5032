//! TAP devices of the machine that the tests run on, which only root can make.

use std::process::Command;

use anyhow::{Context, Result, ensure};

/// A TAP device. Dropped, it is deleted.
#[derive(Debug)]
pub struct Tap {
    name: String,
}

impl Tap {
    /// Makes the TAP device `name` and gives this machine `address` on it, with the length of its prefix.
    ///
    /// # Errors
    ///
    /// When this machine does not let us, or there is one of that name.
    pub fn new(name: &str, address: &str) -> Result<Self> {
        ip(&["tuntap", "add", "dev", name, "mode", "tap"])?;
        let tap = Self {
            name: name.to_owned(),
        };
        ip(&["addr", "add", address, "dev", name])?;
        ip(&["link", "set", name, "up"])?;
        Ok(tap)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        // Nobody is left to complain to.
        let _ = ip(&["link", "delete", &self.name]);
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .context("cannot run ip; install iproute2")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {arguments:?}: {said}");
    Ok(())
}
