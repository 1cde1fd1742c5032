//! The description of the interface for programs, made of the routes and their types.

use utoipa::OpenApi;

use crate::routes;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "fermata",
        description = "Boots, saves and restores virtual machines.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    paths(
        routes::create,
        routes::snapshot,
        routes::send,
        routes::fork,
        routes::list,
        routes::show,
        routes::metrics,
        routes::balloon,
        routes::change_balloon,
        routes::pause,
        routes::resume,
        routes::reset,
        routes::runs,
        routes::cancel_snapshot,
        routes::change_disk,
        routes::end,
        routes::healthz,
        routes::openapi_json
    )
)]
struct Document;

/// The OpenAPI document, as indented JSON that ends with a newline.
pub fn document() -> String {
    let mut json = Document::openapi()
        .to_pretty_json()
        // It is made of constants; a test makes it.
        .unwrap_or_default();
    json.push('\n');
    json
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, env, fs, path::Path};

    use control::{Failure, FailureKind};
    use utoipa::openapi::path::PathItem;

    use super::*;
    use crate::error::ApiError;

    const COMMITTED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/openapi.json");

    /// Set it to write the document instead of comparing it.
    const WRITE: &str = "FERMATA_WRITE_OPENAPI";

    #[test]
    fn the_committed_document_is_the_current_one() {
        let current = document();
        if env::var_os(WRITE).is_some() {
            fs::write(Path::new(COMMITTED), &current).unwrap();
        }
        let committed = fs::read_to_string(COMMITTED).unwrap();
        assert!(
            committed == current,
            "docs/openapi.json is not what the routes say; write it with \
             {WRITE}=1 cargo test -p api-server openapi"
        );
    }

    #[test]
    fn every_route_is_described_and_nothing_else() {
        let served: BTreeSet<_> = routes::all()
            .iter()
            .map(|route| {
                let path = route.uri.path().replace('<', "{").replace('>', "}");
                format!("{} {path}", route.method)
            })
            .collect();
        let described: BTreeSet<_> = Document::openapi()
            .paths
            .paths
            .iter()
            .flat_map(|(path, item)| methods(item).map(move |method| format!("{method} {path}")))
            .collect();
        assert_eq!(served, described);
    }

    #[test]
    fn whatever_a_vmm_refuses_is_described_where_one_is_started() {
        let document = Document::openapi();
        for path in ["/create", "/fork"] {
            let post = document.paths.paths[path].post.as_ref().unwrap();
            for kind in [
                FailureKind::BadRequest,
                FailureKind::NotFound,
                FailureKind::WrongState,
                FailureKind::NotASnapshot,
                FailureKind::NoSpace,
                FailureKind::Host,
            ] {
                let message = String::new();
                let status = ApiError::from(Failure { kind, message }).code.status();
                let described = post.responses.responses.contains_key(&status.to_string());
                assert!(described, "{path} {status}");
            }
        }
    }

    fn methods(item: &PathItem) -> impl Iterator<Item = &'static str> {
        [
            item.get.as_ref().map(|_| "GET"),
            item.post.as_ref().map(|_| "POST"),
            item.patch.as_ref().map(|_| "PATCH"),
            item.delete.as_ref().map(|_| "DELETE"),
        ]
        .into_iter()
        .flatten()
    }
}
