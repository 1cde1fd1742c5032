//! The routes. Each says what it takes and answers, which is also what the OpenAPI document says.

use api_types::{
    Balloon, BalloonChange, CreateAnswer, CreateRequest, DeleteAnswer, DiskChange, DiskStatus,
    ErrorBody, ErrorCode, ForkAnswer, ForkRequest, GuestClock, Health, Metric, Reset, Runs,
    RunsRequest, SNAPSHOT_TAKEN, SendRequest, Sent, SnapshotRequest, Vm,
};
use rocket::{
    Route, State, delete, get,
    http::ContentType,
    patch, post, routes,
    serde::json::{self, Json},
};

use crate::{error::ApiError, machines::Machines, openapi};

type Answer<T> = Result<Json<T>, ApiError>;
type Body<'r, T> = Result<Json<T>, json::Error<'r>>;

pub(crate) fn all() -> Vec<Route> {
    routes![
        create,
        snapshot,
        send,
        fork,
        list,
        show,
        metrics,
        balloon,
        change_balloon,
        pause,
        resume,
        reset,
        runs,
        cancel_snapshot,
        change_disk,
        end,
        healthz,
        openapi_json
    ]
}

/// Boots a kernel or restores a snapshot; answers once the guest runs.
#[utoipa::path(
    tag = "machines",
    request_body = CreateRequest,
    responses(
        (status = 200, description = "The machine runs.", body = CreateAnswer),
        (status = 400, description = "The request cannot be meant.", body = ErrorBody),
        (status = 404, description = "A file is not there.", body = ErrorBody),
        (status = 409, description = "A disk, a TAP device or a socket is in use, or a disk cannot be gone on with: it has been written to since, or is a sealed layer.", body = ErrorBody),
        (status = 413, description = "The request is too long.", body = ErrorBody),
        (status = 422, description = "A file is not a snapshot that this host can run.", body = ErrorBody),
        (status = 500, description = "The host refused.", body = ErrorBody),
        (status = 502, description = "The VMM died.", body = ErrorBody),
        (status = 503, description = "There are too many machines.", body = ErrorBody),
        (status = 504, description = "The machine did not start in time.", body = ErrorBody),
        (status = 507, description = "The file system is full.", body = ErrorBody),
    )
)]
#[post("/create", data = "<body>")]
async fn create(machines: &State<Machines>, body: Body<'_, CreateRequest>) -> Answer<CreateAnswer> {
    machines.create(meant(body)?).await.map(Json)
}

/// Has one machine go on as many, from one instant; answers once all of them run, or leaves none.
#[utoipa::path(
    tag = "machines",
    request_body = ForkRequest,
    responses(
        (status = 200, description = "The machines run.", body = ForkAnswer),
        (status = 400, description = "The request cannot be meant, or the machine writes to a raw disk.", body = ErrorBody),
        (status = 404, description = "There is no such machine or file.", body = ErrorBody),
        (status = 409, description = "The machine is busy with a snapshot, or something of its forks is in use.", body = ErrorBody),
        (status = 413, description = "The request is too long.", body = ErrorBody),
        (status = 422, description = "A file is not a snapshot that this host can run.", body = ErrorBody),
        (status = 500, description = "The host refused.", body = ErrorBody),
        (status = 502, description = "A VMM died.", body = ErrorBody),
        (status = 503, description = "There would be too many machines.", body = ErrorBody),
        (status = 504, description = "A machine did not start in time.", body = ErrorBody),
        (status = 507, description = "The file system is full.", body = ErrorBody),
    )
)]
#[post("/fork", data = "<body>")]
async fn fork(machines: &State<Machines>, body: Body<'_, ForkRequest>) -> Answer<ForkAnswer> {
    machines.fork(meant(body)?).await.map(Json)
}

/// Saves a machine into two files; answers once both are complete and durable.
#[utoipa::path(
    tag = "machines",
    request_body = SnapshotRequest,
    responses(
        (status = 200, description = "Both files are complete and durable.", body = String, example = json!(SNAPSHOT_TAKEN)),
        (status = 400, description = "The request cannot be meant.", body = ErrorBody),
        (status = 404, description = "There is no such machine or directory.", body = ErrorBody),
        (status = 409, description = "The machine is busy with a snapshot already, or this one was cancelled.", body = ErrorBody),
        (status = 413, description = "The request is too long.", body = ErrorBody),
        (status = 500, description = "The host refused.", body = ErrorBody),
        (status = 502, description = "The VMM died; files that were there before are as they were.", body = ErrorBody),
        (status = 504, description = "The VMM did not answer in time.", body = ErrorBody),
        (status = 507, description = "The file system is full.", body = ErrorBody),
    )
)]
#[post("/snapshot", data = "<body>")]
async fn snapshot(
    machines: &State<Machines>,
    body: Body<'_, SnapshotRequest>,
) -> Answer<&'static str> {
    machines.snapshot(meant(body)?).await?;
    Ok(Json(SNAPSHOT_TAKEN))
}

/// Saves a machine on another host, on which `fermata receive` listens; answers once it is complete and durable there.
#[utoipa::path(
    tag = "machines",
    params(("pid" = u32, Path, description = "The VMM's process id.")),
    request_body = SendRequest,
    responses(
        (status = 200, description = "The snapshot is complete and durable there.", body = Sent),
        (status = 400, description = "The request cannot be meant, or the peer does not take such a machine.", body = ErrorBody),
        (status = 404, description = "There is no such machine.", body = ErrorBody),
        (status = 409, description = "The machine is busy with a snapshot already, this one was cancelled or its guest would stand still for too long, or the peer has one of that name.", body = ErrorBody),
        (status = 413, description = "The request is too long.", body = ErrorBody),
        (status = 500, description = "The peer cannot be reached, or was lost.", body = ErrorBody),
        (status = 502, description = "The VMM died.", body = ErrorBody),
        (status = 504, description = "The VMM did not answer in time.", body = ErrorBody),
        (status = 507, description = "The peer has no space left.", body = ErrorBody),
    )
)]
#[post("/vms/<pid>/send", data = "<body>")]
async fn send(machines: &State<Machines>, pid: &str, body: Body<'_, SendRequest>) -> Answer<Sent> {
    let (pid, request) = (process_id(pid)?, meant(body)?);
    machines.send(pid, request).await.map(Json)
}

/// The machines that live, also those that an earlier server or the command line started.
#[utoipa::path(
    tag = "machines",
    responses(
        (status = 200, description = "The machines, by process id.", body = [Vm]),
        (status = 500, description = "The run directory cannot be read.", body = ErrorBody),
    )
)]
#[get("/vms")]
async fn list(machines: &State<Machines>) -> Answer<Vec<Vm>> {
    machines.list().await.map(Json)
}

/// One machine; how it ended, if this server started it and it ended not long ago.
#[utoipa::path(
    tag = "machines",
    params(("pid" = u32, Path, description = "The VMM's process id.")),
    responses(
        (status = 200, description = "The machine.", body = Vm),
        (status = 400, description = "That is not a process id.", body = ErrorBody),
        (status = 404, description = "There is no such machine.", body = ErrorBody),
        (status = 500, description = "The run directory cannot be read.", body = ErrorBody),
    )
)]
#[get("/vms/<pid>")]
async fn show(machines: &State<Machines>, pid: &str) -> Answer<Vm> {
    machines.get(process_id(pid)?).await.map(Json)
}

/// The counters of one machine.
#[utoipa::path(
    tag = "machines",
    params(("pid" = u32, Path, description = "The VMM's process id.")),
    responses(
        (status = 200, description = "The counters since its process began.", body = [Metric]),
        (status = 400, description = "That is not a process id.", body = ErrorBody),
        (status = 404, description = "There is no such machine.", body = ErrorBody),
        (status = 500, description = "The run directory cannot be read.", body = ErrorBody),
        (status = 502, description = "The VMM died.", body = ErrorBody),
        (status = 504, description = "The VMM did not answer in time.", body = ErrorBody),
    )
)]
#[get("/vms/<pid>/metrics")]
async fn metrics(machines: &State<Machines>, pid: &str) -> Answer<Vec<Metric>> {
    machines.metrics(process_id(pid)?).await.map(Json)
}

/// How it stands with a machine's balloon. A guest that runs is asked for its statistics.
#[utoipa::path(
    tag = "machines",
    params(("pid" = u32, Path, description = "The VMM's process id.")),
    responses(
        (status = 200, description = "The balloon.", body = Balloon),
        (status = 400, description = "That is not a process id.", body = ErrorBody),
        (status = 404, description = "There is no such machine, or it has no balloon.", body = ErrorBody),
        (status = 500, description = "The run directory cannot be read.", body = ErrorBody),
        (status = 502, description = "The VMM died.", body = ErrorBody),
        (status = 504, description = "The VMM did not answer in time.", body = ErrorBody),
    )
)]
#[get("/vms/<pid>/balloon")]
async fn balloon(machines: &State<Machines>, pid: &str) -> Answer<Balloon> {
    let change = BalloonChange::default();
    machines.balloon(process_id(pid)?, change).await.map(Json)
}

/// Changes a machine's balloon. Its guest follows in its own time: the answer says how it stands now.
#[utoipa::path(
    tag = "machines",
    params(("pid" = u32, Path, description = "The VMM's process id.")),
    request_body = BalloonChange,
    responses(
        (status = 200, description = "The balloon.", body = Balloon),
        (status = 400, description = "That is not a process id, or the balloon would be larger than the machine.", body = ErrorBody),
        (status = 404, description = "There is no such machine, or it has no balloon.", body = ErrorBody),
        (status = 413, description = "The request is too long.", body = ErrorBody),
        (status = 500, description = "The run directory cannot be read.", body = ErrorBody),
        (status = 502, description = "The VMM died.", body = ErrorBody),
        (status = 504, description = "The VMM did not answer in time.", body = ErrorBody),
    )
)]
#[patch("/vms/<pid>/balloon", data = "<body>")]
async fn change_balloon(
    machines: &State<Machines>,
    pid: &str,
    body: Body<'_, BalloonChange>,
) -> Answer<Balloon> {
    let pid = process_id(pid)?;
    machines.balloon(pid, meant(body)?).await.map(Json)
}

/// Holds a machine: no instruction of its guest is executed until it goes on. One that is held stays so.
#[utoipa::path(
    tag = "machines",
    params(("pid" = u32, Path, description = "The VMM's process id.")),
    responses(
        (status = 200, description = "The machine, held.", body = Vm),
        (status = 400, description = "That is not a process id.", body = ErrorBody),
        (status = 404, description = "There is no such machine.", body = ErrorBody),
        (status = 409, description = "The machine is being saved, or has ended.", body = ErrorBody),
        (status = 500, description = "The machine cannot be held.", body = ErrorBody),
        (status = 502, description = "The VMM died.", body = ErrorBody),
        (status = 504, description = "The VMM did not answer in time.", body = ErrorBody),
    )
)]
#[post("/vms/<pid>/pause")]
async fn pause(machines: &State<Machines>, pid: &str) -> Answer<Vm> {
    machines.pause(process_id(pid)?).await.map(Json)
}

/// Lets a machine go on that is held. One that runs goes on.
#[utoipa::path(
    tag = "machines",
    params(
        ("pid" = u32, Path, description = "The VMM's process id."),
        ("clock" = Option<GuestClock>, Query, description = "What its clocks have done meanwhile: stand-still, unless told otherwise."),
    ),
    responses(
        (status = 200, description = "The machine, running.", body = Vm),
        (status = 400, description = "That is not a process id, or not a way for clocks to go.", body = ErrorBody),
        (status = 404, description = "There is no such machine.", body = ErrorBody),
        (status = 409, description = "The machine is being saved, or has ended.", body = ErrorBody),
        (status = 500, description = "The machine cannot go on.", body = ErrorBody),
        (status = 502, description = "The VMM died.", body = ErrorBody),
        (status = 504, description = "The VMM did not answer in time.", body = ErrorBody),
    )
)]
#[post("/vms/<pid>/resume?<clock>")]
async fn resume(machines: &State<Machines>, pid: &str, clock: Option<&str>) -> Answer<Vm> {
    let clock = guest_clock(clock)?;
    machines.resume(process_id(pid)?, clock).await.map(Json)
}

/// Has a machine be what it was when it was forked, or restored from two files: it undoes what it has done since. If it ran it
/// goes on from there, else it stays held.
#[utoipa::path(
    tag = "machines",
    params(
        ("pid" = u32, Path, description = "The VMM's process id."),
        ("clock" = Option<GuestClock>, Query, description = "What its clocks have done since it was saved: stand-still, unless told otherwise."),
    ),
    responses(
        (status = 200, description = "The machine is what it was.", body = Reset),
        (status = 400, description = "That is not a process id, or not a way for clocks to go.", body = ErrorBody),
        (status = 404, description = "There is no such machine.", body = ErrorBody),
        (status = 409, description = "The machine is being saved, has ended, or has nothing that it could go back to: it was booted, its memory is not mapped, or it writes to a raw disk.", body = ErrorBody),
        (status = 500, description = "The machine cannot be reset; if it could not go on either, it has ended.", body = ErrorBody),
        (status = 502, description = "The VMM died.", body = ErrorBody),
        (status = 504, description = "The VMM did not answer in time.", body = ErrorBody),
        (status = 507, description = "The file system is full, and the machine has ended.", body = ErrorBody),
    )
)]
#[post("/vms/<pid>/reset?<clock>")]
async fn reset(machines: &State<Machines>, pid: &str, clock: Option<&str>) -> Answer<Reset> {
    let clock = guest_clock(clock)?;
    machines.reset(process_id(pid)?, clock).await.map(Json)
}

/// Has a machine run from where it was forked, or restored from two files, over and over: it is reset each time that its guest says by the
/// run port (`docs/run-port.md`) that it is done with result zero. Answers when all runs are done, one had another result or took
/// too long, or another request about the machine ended them.
#[utoipa::path(
    tag = "machines",
    params(("pid" = u32, Path, description = "The VMM's process id.")),
    request_body = RunsRequest,
    responses(
        (status = 200, description = "The runs have ended.", body = Runs),
        (status = 400, description = "The request cannot be meant.", body = ErrorBody),
        (status = 404, description = "There is no such machine.", body = ErrorBody),
        (status = 409, description = "The machine is being saved, has ended, or has nothing that it could go back to, as of a reset.", body = ErrorBody),
        (status = 413, description = "The request is too long.", body = ErrorBody),
        (status = 500, description = "The machine cannot be reset; if it could not go on either, it has ended.", body = ErrorBody),
        (status = 502, description = "The VMM died.", body = ErrorBody),
        (status = 504, description = "The VMM did not answer in time.", body = ErrorBody),
        (status = 507, description = "The file system is full, and the machine has ended.", body = ErrorBody),
    )
)]
#[post("/vms/<pid>/runs", data = "<body>")]
async fn runs(machines: &State<Machines>, pid: &str, body: Body<'_, RunsRequest>) -> Answer<Runs> {
    let request = meant(body)?;
    machines.runs(process_id(pid)?, request).await.map(Json)
}

/// Cancels the snapshot that is being taken of a machine: the request for it fails, and nothing of it is kept. The machine runs, or
/// stays held if it was and has not been let go on by then.
#[utoipa::path(
    tag = "machines",
    params(("pid" = u32, Path, description = "The VMM's process id.")),
    responses(
        (status = 200, description = "The machine; the snapshot is not taken.", body = Vm),
        (status = 400, description = "That is not a process id.", body = ErrorBody),
        (status = 404, description = "There is no such machine.", body = ErrorBody),
        (status = 409, description = "No snapshot of it is being taken, or it is about to be complete and is kept.", body = ErrorBody),
        (status = 502, description = "The VMM died.", body = ErrorBody),
        (status = 504, description = "The VMM did not answer in time.", body = ErrorBody),
    )
)]
#[delete("/vms/<pid>/snapshot")]
async fn cancel_snapshot(machines: &State<Machines>, pid: &str) -> Answer<Vm> {
    machines.cancel_snapshot(process_id(pid)?).await.map(Json)
}

/// Changes a disk of a machine, whether it runs or is held: all that is asked for, or nothing. Disks only grow, which the guest is
/// told. Of a limit that is another than it was nothing is used up, and requests that wait for it are looked at again at once. A reset has
/// the machine have the limits again that it is reset to.
#[utoipa::path(
    tag = "machines",
    params(
        ("pid" = u32, Path, description = "The VMM's process id."),
        ("disk" = u32, Path, description = "The disk's number, from 0 in the order of the disks."),
    ),
    request_body = DiskChange,
    responses(
        (status = 200, description = "The disk as it is now.", body = DiskStatus),
        (status = 400, description = "The request cannot be meant: nothing to change, a smaller disk, or not of whole sectors.", body = ErrorBody),
        (status = 404, description = "There is no such machine, or it has no such disk.", body = ErrorBody),
        (status = 409, description = "The machine is being saved, or has ended.", body = ErrorBody),
        (status = 413, description = "The request is too long.", body = ErrorBody),
        (status = 500, description = "The host refused.", body = ErrorBody),
        (status = 502, description = "The VMM died.", body = ErrorBody),
        (status = 504, description = "The VMM did not answer in time.", body = ErrorBody),
        (status = 507, description = "The file system is full.", body = ErrorBody),
    )
)]
#[patch("/vms/<pid>/disks/<disk>", data = "<body>")]
async fn change_disk(
    machines: &State<Machines>,
    pid: &str,
    disk: &str,
    body: Body<'_, DiskChange>,
) -> Answer<DiskStatus> {
    let (pid, disk, change) = (process_id(pid)?, disk_number(disk)?, meant(body)?);
    machines.change_disk(pid, disk, change).await.map(Json)
}

/// Ends a machine without asking its guest; answers once its process is gone.
#[utoipa::path(
    tag = "machines",
    params(("pid" = u32, Path, description = "The VMM's process id.")),
    responses(
        (status = 200, description = "It has ended.", body = DeleteAnswer),
        (status = 400, description = "That is not a process id.", body = ErrorBody),
        (status = 404, description = "There is no such machine.", body = ErrorBody),
        (status = 500, description = "The process cannot be ended.", body = ErrorBody),
    )
)]
#[delete("/vms/<pid>")]
async fn end(machines: &State<Machines>, pid: &str) -> Answer<DeleteAnswer> {
    machines.delete(process_id(pid)?).await.map(Json)
}

/// Whether the server can do its work.
#[utoipa::path(
    tag = "server",
    responses(
        (status = 200, description = "It can.", body = Health),
        (status = 500, description = "The run directory cannot be read.", body = ErrorBody),
    )
)]
#[get("/healthz")]
async fn healthz(machines: &State<Machines>) -> Answer<Health> {
    machines.health().map(Json)
}

/// This description.
#[utoipa::path(tag = "server", responses((status = 200, description = "An OpenAPI document.", content_type = "application/json")))]
#[get("/openapi.json")]
fn openapi_json() -> (ContentType, String) {
    (ContentType::JSON, openapi::document())
}

/// The request in a body, whatever its content type: clients in the field do not all name one.
fn meant<T>(body: Body<'_, T>) -> Result<T, ApiError> {
    match body {
        Ok(Json(request)) => Ok(request),
        Err(json::Error::Parse(_, error)) => Err(ApiError::new(
            ErrorCode::BadRequest,
            format!("the request is not the JSON that is meant: {error}"),
        )),
        Err(json::Error::Io(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => Err(
            ApiError::new(ErrorCode::TooLarge, "the request is too long; shorten it"),
        ),
        Err(json::Error::Io(error)) => Err(ApiError::new(
            ErrorCode::BadRequest,
            format!("the request could not be read: {error}"),
        )),
    }
}

fn guest_clock(text: Option<&str>) -> Result<GuestClock, ApiError> {
    let Some(text) = text else {
        return Ok(GuestClock::default());
    };
    // In its own words, so that there is one list of them.
    json::from_value(text.into()).map_err(|_| {
        ApiError::new(
            ErrorCode::BadRequest,
            format!("{text:?} is not what clocks do; say stand-still or follow"),
        )
    })
}

fn disk_number(text: &str) -> Result<u32, ApiError> {
    text.parse().map_err(|_| {
        ApiError::new(
            ErrorCode::BadRequest,
            format!("{text:?} is not the number of a disk; the first has number 0"),
        )
    })
}

fn process_id(text: &str) -> Result<u32, ApiError> {
    text.parse().map_err(|_| {
        ApiError::new(
            ErrorCode::BadRequest,
            format!("{text:?} is not a process id; GET /vms lists them"),
        )
    })
}
