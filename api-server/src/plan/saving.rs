//! From a request for a snapshot to what a VMM is told.

use std::num::NonZeroU64;

use api_types::ErrorCode;
use control::{AfterSnapshot, Destination, MemoryCopy, SnapshotRequest};

use super::{different, guest_clock};
use crate::{ServerConfig, error::ApiError, tree::Tree};

pub(crate) fn snapshot(
    config: &ServerConfig,
    tree: &Tree,
    request: &api_types::SnapshotRequest,
) -> Result<SnapshotRequest, ApiError> {
    let state = tree.output("cpu_snapshot_path", &request.cpu_snapshot_path)?;
    let memory = tree.output("memory_snapshot_path", &request.memory_snapshot_path)?;
    different(&state, &memory)?;
    let to = match config.store.clone() {
        None => Destination::Files { state, memory },
        Some(store) => Destination::Referenced {
            store,
            state,
            memory,
        },
    };
    let mut planned = SnapshotRequest::new(to, then(request.resume, request.clock));
    planned.copy = request.copy.map(copy);
    limits(
        &mut planned,
        request.bytes_per_second,
        request.downtime_limit_ms,
    )?;
    Ok(planned)
}

/// Of a snapshot that is sent to one of the operator's peers.
pub(crate) fn send(
    config: &ServerConfig,
    request: &api_types::SendRequest,
) -> Result<SnapshotRequest, ApiError> {
    let peers = config.peers.as_ref();
    let peers = peers.filter(|peers| peers.addresses.contains(&request.peer));
    let peers = peers.ok_or_else(|| {
        ApiError::new(
            ErrorCode::BadRequest,
            format!(
                "peer {:?} is none that this server sends to; name one that it was started with (--peer)",
                request.peer
            ),
        )
    })?;
    let to = Destination::Peer {
        address: request.peer.clone(),
        key_file: peers.key_file.clone(),
        name: request.name.clone(),
    };
    let mut planned = SnapshotRequest::new(to, then(request.resume, request.clock));
    planned.copy = request.copy.map(copy);
    limits(
        &mut planned,
        request.bytes_per_second,
        request.downtime_limit_ms,
    )?;
    Ok(planned)
}

fn limits(
    planned: &mut SnapshotRequest,
    bytes_per_second: Option<u64>,
    downtime_limit_ms: Option<u64>,
) -> Result<(), ApiError> {
    planned.bytes_per_second = not_none("bytes_per_second", bytes_per_second)?;
    planned.downtime_limit_ms = not_none("downtime_limit_ms", downtime_limit_ms)?;
    Ok(())
}

fn then(resume: bool, clock: api_types::GuestClock) -> AfterSnapshot {
    match resume {
        true => AfterSnapshot::Resume(guest_clock(clock)),
        false => AfterSnapshot::Halt,
    }
}

fn copy(copy: api_types::MemoryCopy) -> MemoryCopy {
    match copy {
        api_types::MemoryCopy::StopAndCopy => MemoryCopy::StopAndCopy,
        api_types::MemoryCopy::CopyOnWrite => MemoryCopy::CopyOnWrite,
        api_types::MemoryCopy::PreCopy => MemoryCopy::PreCopy,
    }
}

fn not_none(field: &str, value: Option<u64>) -> Result<Option<NonZeroU64>, ApiError> {
    let value = value.map(|value| {
        NonZeroU64::new(value).ok_or_else(|| {
            ApiError::new(
                ErrorCode::BadRequest,
                format!("{field} is 0, with which nothing would ever be saved; ask for more, or leave it out"),
            )
        })
    });
    value.transpose()
}

#[cfg(test)]
mod tests {
    use control::{GuestClock, StoreLocation};

    use super::*;
    use crate::config::Peers;

    struct Bench {
        dir: tempfile::TempDir,
        config: ServerConfig,
        tree: Tree,
    }

    impl Bench {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            Self {
                config: ServerConfig::new(dir.path(), "/no/vmm"),
                tree: Tree::open(dir.path()).unwrap(),
                dir,
            }
        }
    }

    fn request() -> api_types::SnapshotRequest {
        api_types::SnapshotRequest {
            cpu_snapshot_path: "new-state".to_owned(),
            memory_snapshot_path: "new-memory".to_owned(),
            rpc_port: 1,
            resume: true,
            clock: api_types::GuestClock::Follow,
            copy: Some(api_types::MemoryCopy::StopAndCopy),
            bytes_per_second: None,
            downtime_limit_ms: None,
        }
    }

    #[test]
    fn a_snapshot_goes_into_two_files_in_the_tree() {
        let bench = Bench::new();
        let mut request = request();
        let plan = |request: &_| snapshot(&bench.config, &bench.tree, request);
        let planned = plan(&request).unwrap();
        let Destination::Files { state, .. } = &planned.to else {
            panic!("{:?}", planned.to);
        };
        assert_eq!(
            state.parent().unwrap(),
            bench.dir.path().canonicalize().unwrap()
        );
        assert_eq!(planned.then, AfterSnapshot::Resume(GuestClock::Follow));
        assert_eq!(planned.copy, Some(MemoryCopy::StopAndCopy));
        request.bytes_per_second = Some(5);
        request.downtime_limit_ms = Some(7);
        let planned = plan(&request).unwrap();
        assert_eq!(planned.bytes_per_second, NonZeroU64::new(5));
        assert_eq!(planned.downtime_limit_ms, NonZeroU64::new(7));
        request.bytes_per_second = Some(0);
        assert_eq!(plan(&request).unwrap_err().code, ErrorCode::BadRequest);
        request.bytes_per_second = None;
        request.resume = false;
        assert_eq!(plan(&request).unwrap().then, AfterSnapshot::Halt);
        request.memory_snapshot_path = "./new-state".to_owned();
        assert_eq!(plan(&request).unwrap_err().code, ErrorCode::BadRequest);
        request.memory_snapshot_path = "no/such/directory".to_owned();
        assert_eq!(plan(&request).unwrap_err().code, ErrorCode::NotFound);
    }

    #[test]
    fn a_server_with_a_store_has_memory_files_refer_to_it() {
        let mut bench = Bench::new();
        let location = StoreLocation {
            directory: "/store".into(),
            key_file: None,
        };
        bench.config.store = Some(location.clone());
        let planned = snapshot(&bench.config, &bench.tree, &request()).unwrap();
        assert!(
            matches!(&planned.to, Destination::Referenced { store, .. } if *store == location),
            "{:?}",
            planned.to
        );
    }

    #[test]
    fn a_snapshot_is_sent_to_the_operators_peers_alone() {
        let mut bench = Bench::new();
        let request = |peer: &str| -> api_types::SendRequest {
            let json = format!(r#"{{"peer": {peer:?}, "name": "monday", "resume": false}}"#);
            serde_json::from_str(&json).unwrap()
        };
        let there = request("there:7070");
        let refused = send(&bench.config, &there).unwrap_err();
        assert_eq!(refused.code, ErrorCode::BadRequest);
        bench.config.peers = Some(Peers {
            key_file: "/key".into(),
            addresses: vec!["there:7070".to_owned()],
        });
        let planned = send(&bench.config, &there).unwrap();
        let to = Destination::Peer {
            address: "there:7070".to_owned(),
            key_file: "/key".into(),
            name: "monday".to_owned(),
        };
        assert_eq!((planned.to, planned.then), (to, AfterSnapshot::Halt));
        send(&bench.config, &request("there:7071")).unwrap_err();
    }
}
