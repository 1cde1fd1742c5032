//! Rocket's own errors, in JSON.

use api_types::ErrorCode;
use rocket::{Catcher, Request, catch, catchers, http::Status};

use crate::error::ApiError;

pub(crate) fn all() -> Vec<Catcher> {
    catchers![any]
}

#[catch(default)]
fn any(status: Status, request: &Request<'_>) -> ApiError {
    let (method, path) = (request.method(), request.uri().path());
    match status.code {
        404 => ApiError::new(
            ErrorCode::NotFound,
            format!("there is no {method} {path}; GET /openapi.json lists what there is"),
        ),
        413 => ApiError::new(ErrorCode::TooLarge, "the request is too long; shorten it"),
        // A client error that no route of ours makes: a malformed header, say.
        400..500 => ApiError::new(
            ErrorCode::BadRequest,
            format!("{method} {path} cannot be understood; GET /openapi.json says how to ask"),
        ),
        _ => ApiError::new(
            ErrorCode::Internal,
            format!("{method} {path} failed, which is a fault of fermata; its log says more"),
        ),
    }
}
