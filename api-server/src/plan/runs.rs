//! From a request for runs to what a VMM is told.

use std::num::{NonZeroU32, NonZeroU64};

use api_types::ErrorCode;
use control::RunsRequest;

use super::guest_clock;
use crate::error::ApiError;

pub(crate) fn runs(request: api_types::RunsRequest) -> Result<RunsRequest, ApiError> {
    let none = |field| {
        let message = match field {
            "runs" => "runs cannot be 0; say at least 1".to_owned(),
            _ => format!("{field} cannot be 0; leave it out, or say at least 1"),
        };
        ApiError::new(ErrorCode::BadRequest, message)
    };
    let api_types::RunsRequest {
        runs,
        first,
        run_limit_ms,
        clock,
    } = request;
    let limit =
        run_limit_ms.map(|limit| NonZeroU64::new(limit).ok_or_else(|| none("run_limit_ms")));
    Ok(RunsRequest {
        runs: NonZeroU32::new(runs).ok_or_else(|| none("runs"))?,
        first: NonZeroU32::new(first.unwrap_or(1)).ok_or_else(|| none("first"))?,
        run_limit_ms: limit.transpose()?,
        clock: guest_clock(clock),
    })
}
