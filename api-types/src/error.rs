//! What every request that fails is answered with.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(example = json!({"error": "not_found", "message": "no VM has port 4711; GET /vms lists them"}))]
pub struct ErrorBody {
    /// In a word, for programs.
    pub error: ErrorCode,
    /// In a sentence that says what to do, for people.
    pub message: String,
}

/// Why a request failed, in a word. Each belongs to one status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// 400: the request cannot be understood or cannot be meant.
    BadRequest,
    /// 403: a web page asks.
    Forbidden,
    /// 404: there is no such VM, port, path, or route.
    NotFound,
    /// 409: the machine is not in a state in which this can be done.
    WrongState,
    /// 413: the request is too long.
    TooLarge,
    /// 422: a file is not a snapshot, is damaged, or is for another machine or CPU.
    NotASnapshot,
    /// 500: the host refused, or fermata has a fault.
    Internal,
    /// 502: the VMM went away before it answered.
    VmmLost,
    /// 503: the server has as many machines as it may.
    TooManyVms,
    /// 504: the VMM did not answer in time.
    Deadline,
    /// 507: the file system is full.
    NoSpace,
}

impl ErrorCode {
    /// Every code.
    pub const ALL: [Self; 11] = [
        Self::BadRequest,
        Self::Forbidden,
        Self::NotFound,
        Self::WrongState,
        Self::TooLarge,
        Self::NotASnapshot,
        Self::Internal,
        Self::VmmLost,
        Self::TooManyVms,
        Self::Deadline,
        Self::NoSpace,
    ];

    /// The HTTP status it belongs to.
    pub fn status(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::Forbidden => 403,
            Self::NotFound => 404,
            Self::WrongState => 409,
            Self::TooLarge => 413,
            Self::NotASnapshot => 422,
            Self::Internal => 500,
            Self::VmmLost => 502,
            Self::TooManyVms => 503,
            Self::Deadline => 504,
            Self::NoSpace => 507,
        }
    }
}
