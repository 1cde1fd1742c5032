//! How a VMM process ends.

use serde::{Deserialize, Serialize};

/// The exit code of a VMM process. The numbers are part of the interface and do not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// 0: the guest powered off.
    PowerOff,
    /// 1: the VMM failed; standard error says why.
    Failed,
    /// 2: the VMM was not started as it should be.
    Usage,
    /// 10: the guest asked for a reset.
    Reboot,
    /// 11: the guest had a triple fault.
    TripleFault,
    /// 12: a snapshot was taken after which the machine should not go on.
    Halted,
    /// 13: a client stopped it.
    Stopped,
}

impl Exit {
    /// Every way to end.
    pub const ALL: [Self; 7] = [
        Self::PowerOff,
        Self::Failed,
        Self::Usage,
        Self::Reboot,
        Self::TripleFault,
        Self::Halted,
        Self::Stopped,
    ];

    /// The process exit code.
    pub fn code(self) -> u8 {
        match self {
            Self::PowerOff => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Reboot => 10,
            Self::TripleFault => 11,
            Self::Halted => 12,
            Self::Stopped => 13,
        }
    }

    /// What the exit code `code` means, if it is one of ours.
    pub fn from_code(code: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|e| i32::from(e.code()) == code)
    }
}
