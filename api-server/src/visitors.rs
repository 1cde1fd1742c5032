//! Requests that a web page makes, by the browser of somebody who can reach the server. There is no authentication, and no page of
//! fermata's: whatever page asks is a stranger's.

use std::net::{IpAddr, Ipv4Addr};

use api_types::ErrorCode;
use rocket::{
    Data, Request, Route, async_trait,
    fairing::{Fairing, Info, Kind},
    get,
    http::{HeaderMap, Method, uri::Host},
    routes, uri,
};

use crate::error::ApiError;

/// Has such requests be answered by [`refused`] alone.
pub(crate) struct Visitors {
    /// Whether the server listens on loopback: nobody then knows it by a name that a page could have been got from.
    pub(crate) loopback: bool,
}

#[async_trait]
impl Fairing for Visitors {
    fn info(&self) -> Info {
        Info {
            name: "requests of web pages",
            kind: Kind::Request,
        }
    }

    async fn on_request(&self, request: &mut Request<'_>, _: &mut Data<'_>) {
        let renamed = self.loopback && !request.host().is_none_or(is_of_this_host);
        if renamed || is_of_a_page(request.headers()) {
            request.set_method(Method::Get);
            request.set_uri(uri!(refused));
        }
    }
}

/// Whether a browser says that a page asks. A form or a script of a page that comes from elsewhere needs nobody's leave to send a request, whose
/// answer it then may not read (<https://fetch.spec.whatwg.org/#http-origin>, <https://www.w3.org/TR/fetch-metadata/>).
fn is_of_a_page(headers: &HeaderMap<'_>) -> bool {
    let site = headers.get_one("Sec-Fetch-Site");
    headers.contains("Origin") || site.is_some_and(|site| !matches!(site, "none" | "same-origin"))
}

/// Whether a host is named as one that asks itself does. By any other name a page could have been got that has since been given this address:
/// for its browser, page and server are then of one origin, and the page may read answers.
fn is_of_this_host(host: &Host<'_>) -> bool {
    let domain = host.domain().as_str();
    let address = domain.trim_start_matches('[').trim_end_matches(']');
    address.parse::<IpAddr>().is_ok() || domain.eq_ignore_ascii_case("localhost")
}

/// What a web page gets, whatever it asks for.
#[get("/refused")]
fn refused() -> ApiError {
    ApiError::new(
        ErrorCode::Forbidden,
        format!(
            "requests of web pages are refused; leave out Origin, and name the server by its address, {} or localhost",
            Ipv4Addr::LOCALHOST
        ),
    )
}

pub(crate) fn routes() -> Vec<Route> {
    routes![refused]
}
