//! How many files a process may have open.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Takes as many as this process may have: a disk that branches is one file for each layer, and a machine that is being started
/// is three to who starts it.
pub fn allow_many_files() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let most = Rlimit {
        current: maximum,
        maximum,
    };
    if let Err(e) = setrlimit(Resource::Nofile, most) {
        tracing::debug!("the limit of open files stays as it is: {e}");
    }
}
