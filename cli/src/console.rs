//! The device of a machine's console, as the flag and files give it.

use control::ConsoleDevice;
use schemars::JsonSchema;
use serde::Deserialize;

/// The device that a machine's console is, and that what is typed goes to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Console {
    /// The serial port, ttyS0. Each byte costs the guest an exit.
    #[default]
    Serial,
    /// A virtio console, hvc0, beside the serial port. Both write to the same.
    Virtio,
}

impl Console {
    /// The kernel's command line, if nothing else is said: the last console is the one that user space has. A panic or a
    /// reboot ends the machine. The serial port is there from the first message on, and to a kernel without a driver for
    /// the other.
    pub(crate) fn cmdline(self) -> &'static str {
        match self {
            Self::Serial => "console=ttyS0 reboot=k panic=-1",
            Self::Virtio => "console=ttyS0 console=hvc0 reboot=k panic=-1",
        }
    }
}

impl From<Console> for ConsoleDevice {
    fn from(console: Console) -> Self {
        match console {
            Console::Serial => Self::Serial,
            Console::Virtio => Self::Virtio,
        }
    }
}
