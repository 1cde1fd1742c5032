//! Every failure as the status and the JSON that a client gets.

use api_types::{ErrorBody, ErrorCode};
use control::{ClientError, Failure, FailureKind, RegistryError, SpawnError};
use rocket::{
    Request, Response,
    http::Status,
    response::{self, Responder},
    serde::json::Json,
};
use tracing::warn;

use crate::tree::PathError;

/// A request that failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct ApiError {
    pub(crate) code: ErrorCode,
    pub(crate) message: String,
}

impl ApiError {
    pub(crate) fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    /// An error with what caused it, which a client needs to know as much as the operator does.
    pub(crate) fn with_causes(code: ErrorCode, error: &dyn std::error::Error) -> Self {
        let mut message = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            message.push_str(": ");
            message.push_str(&error.to_string());
            cause = error.source();
        }
        Self { code, message }
    }
}

impl<'r> Responder<'r, 'static> for ApiError {
    fn respond_to(self, request: &'r Request<'_>) -> response::Result<'static> {
        let Self { code, message } = self;
        warn!(?code, message, method = %request.method(), path = %request.uri().path(), "a request failed");
        let body = Json(ErrorBody {
            error: code,
            message,
        });
        Response::build_from(body.respond_to(request)?)
            .status(Status::new(code.status()))
            .ok()
    }
}

impl From<PathError> for ApiError {
    fn from(error: PathError) -> Self {
        let code = match error {
            PathError::NotFound { .. } | PathError::NoDirectory { .. } => ErrorCode::NotFound,
            PathError::Empty(_)
            | PathError::Outside { .. }
            | PathError::NotAFile { .. }
            | PathError::Unusable { .. } => ErrorCode::BadRequest,
            PathError::Host { .. } => ErrorCode::Internal,
        };
        // Its messages name their causes.
        Self::new(code, error.to_string())
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        let code = match failure.kind {
            FailureKind::BadRequest => ErrorCode::BadRequest,
            FailureKind::NotFound => ErrorCode::NotFound,
            FailureKind::WrongState => ErrorCode::WrongState,
            FailureKind::NotASnapshot => ErrorCode::NotASnapshot,
            FailureKind::NoSpace => ErrorCode::NoSpace,
            FailureKind::Host | FailureKind::Internal => ErrorCode::Internal,
        };
        Self::new(code, failure.message)
    }
}

impl From<ClientError> for ApiError {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Refused(failure) => failure.into(),
            ClientError::Silent { .. } | ClientError::Deadline(_) => {
                Self::with_causes(ErrorCode::Deadline, &error)
            }
            ClientError::Connect { .. } | ClientError::Handshake { .. } | ClientError::Lost(_) => {
                Self::with_causes(ErrorCode::VmmLost, &error)
            }
        }
    }
}

impl From<SpawnError> for ApiError {
    fn from(error: SpawnError) -> Self {
        match error {
            error if error.is_no_space() => Self::with_causes(ErrorCode::NoSpace, &error),
            SpawnError::Refused(failure) => failure.into(),
            SpawnError::Deadline { .. } => Self::with_causes(ErrorCode::Deadline, &error),
            SpawnError::Died { .. } => Self::with_causes(ErrorCode::VmmLost, &error),
            SpawnError::Program { .. }
            | SpawnError::Host(_)
            | SpawnError::Registry(_)
            | SpawnError::Log { .. }
            | SpawnError::Protocol { .. } => Self::with_causes(ErrorCode::Internal, &error),
        }
    }
}

impl From<RegistryError> for ApiError {
    fn from(error: RegistryError) -> Self {
        let code = match error.is_no_space() {
            true => ErrorCode::NoSpace,
            false => ErrorCode::Internal,
        };
        Self::with_causes(code, &error)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn status_of(kind: FailureKind) -> u16 {
        let error = ApiError::from(Failure {
            kind,
            message: "so it is".to_owned(),
        });
        assert_eq!(error.message, "so it is");
        error.code.status()
    }

    #[test]
    fn what_a_vmm_refuses_has_the_status_of_the_contract() {
        assert_eq!(status_of(FailureKind::BadRequest), 400);
        assert_eq!(status_of(FailureKind::NotFound), 404);
        assert_eq!(status_of(FailureKind::WrongState), 409);
        assert_eq!(status_of(FailureKind::NotASnapshot), 422);
        assert_eq!(status_of(FailureKind::NoSpace), 507);
        assert_eq!(status_of(FailureKind::Host), 500);
        assert_eq!(status_of(FailureKind::Internal), 500);
    }

    #[test]
    fn each_code_has_a_status_of_its_own() {
        let statuses: HashSet<_> = ErrorCode::ALL.into_iter().map(ErrorCode::status).collect();
        assert_eq!(statuses.len(), ErrorCode::ALL.len());
    }

    #[test]
    fn a_full_run_directory_is_no_space() {
        let full = |kind: std::io::ErrorKind| RegistryError::Io {
            path: "/run".into(),
            source: kind.into(),
        };
        let code = |error: ApiError| error.code;
        let (space, other) = (
            std::io::ErrorKind::StorageFull,
            std::io::ErrorKind::NotADirectory,
        );
        assert_eq!(code(full(space).into()), ErrorCode::NoSpace);
        assert_eq!(
            code(SpawnError::from(full(space)).into()),
            ErrorCode::NoSpace
        );
        assert_eq!(code(full(other).into()), ErrorCode::Internal);
    }

    #[test]
    fn causes_are_told() {
        let error = ApiError::from(ClientError::Connect {
            port: 9,
            source: std::io::Error::other("refused"),
        });
        assert_eq!(error.code, ErrorCode::VmmLost);
        assert!(error.message.ends_with(": refused"), "{error}");
    }
}
