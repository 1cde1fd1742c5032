//! One module per command.

pub(crate) mod balloon;
pub(crate) mod cancel;
pub(crate) mod disk;
pub(crate) mod fork;
pub(crate) mod inspect;
pub(crate) mod metrics;
pub(crate) mod pause;
pub(crate) mod ps;
pub(crate) mod receive;
pub(crate) mod reset;
pub(crate) mod restore;
pub(crate) mod run;
pub(crate) mod serve;
pub(crate) mod snapshot;
pub(crate) mod stop;
pub(crate) mod store;
