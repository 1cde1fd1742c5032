//! QEMU's monitor protocol: <https://www.qemu.org/docs/master/interop/qmp-spec.html>.

use std::{
    collections::VecDeque,
    io::{BufRead, BufReader, IoSlice, Write},
    mem::MaybeUninit,
    os::{fd::AsFd, unix::net::UnixStream},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Deserialize;
use serde_json::{Value, json};

/// How long QEMU may take to say anything.
const PATIENCE: Duration = Duration::from_secs(180);

/// How often QEMU is asked for what it does not tell.
pub(super) const RETRY: Duration = Duration::from_millis(2);

/// A connection to a monitor.
#[derive(Debug)]
pub(crate) struct Qmp {
    stream: BufReader<UnixStream>,
    events: VecDeque<Event>,
}

/// Something that happened in QEMU.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(crate) struct Event {
    #[serde(rename = "event")]
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) data: Value,
    timestamp: Timestamp,
}

/// Time since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
struct Timestamp {
    seconds: u64,
    microseconds: u64,
}

impl Event {
    /// When it happened, since 1970.
    pub(crate) fn time(&self) -> Duration {
        let Timestamp {
            seconds,
            microseconds,
        } = self.timestamp;
        Duration::from_secs(seconds) + Duration::from_micros(microseconds)
    }
}

#[derive(Debug, PartialEq, Deserialize)]
#[serde(untagged)]
enum Message {
    Event(Event),
    Return {
        #[serde(rename = "return")]
        value: Value,
    },
    Error {
        error: Problem,
    },
    Greeting {
        #[serde(rename = "QMP")]
        _version: Value,
    },
}

#[derive(Debug, PartialEq, Deserialize)]
struct Problem {
    desc: String,
}

impl Qmp {
    /// Connects to the socket at `path`, which may take a while to be there, and negotiates.
    pub(crate) fn connect(path: &Path) -> Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(_) if Instant::now() < deadline => std::thread::sleep(RETRY),
                Err(e) => return Err(e).context("QEMU's monitor does not listen"),
            }
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut qmp = Self {
            stream: BufReader::new(stream),
            events: VecDeque::new(),
        };
        let Message::Greeting { .. } = qmp.receive()? else {
            bail!("QEMU's monitor does not greet");
        };
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Executes `command` and returns its result.
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let line = request(command, arguments);
        self.stream.get_mut().write_all(line.as_bytes())?;
        self.result_of(command)
    }

    /// Has QEMU know the file descriptor `fd` as `name`.
    pub(crate) fn pass(&mut self, fd: impl AsFd, name: &str) -> Result<()> {
        let line = request("getfd", json!({ "fdname": name }));
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [fd.as_fd()];
        anyhow::ensure!(
            control.push(SendAncillaryMessage::ScmRights(&fds)),
            "one file descriptor does not fit a control message"
        );
        let sent = sendmsg(
            self.stream.get_ref(),
            &[IoSlice::new(line.as_bytes())],
            &mut control,
            SendFlags::empty(),
        )?;
        self.stream.get_mut().write_all(&line.as_bytes()[sent..])?;
        self.result_of("getfd")?;
        Ok(())
    }

    /// Waits for an event in which `find` finds something, past those it does not.
    pub(crate) fn wait_for<T>(&mut self, find: impl Fn(&Event) -> Result<Option<T>>) -> Result<T> {
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => match self.receive()? {
                    Message::Event(event) => event,
                    other => bail!("QEMU said {other:?} where an event was expected"),
                },
            };
            if let Some(found) = find(&event)? {
                return Ok(found);
            }
        }
    }

    fn result_of(&mut self, command: &str) -> Result<Value> {
        loop {
            match self.receive()? {
                Message::Return { value } => return Ok(value),
                Message::Error { error } => bail!("QEMU refuses {command}: {}", error.desc),
                Message::Event(event) => self.events.push_back(event),
                Message::Greeting { .. } => bail!("QEMU greets a second time"),
            }
        }
    }

    fn receive(&mut self) -> Result<Message> {
        let mut line = String::new();
        let read = self.stream.read_line(&mut line);
        if read.context("QEMU's monitor is silent")? == 0 {
            bail!("QEMU has closed its monitor");
        }
        parse(&line)
    }
}

fn request(command: &str, arguments: Value) -> String {
    format!(
        "{}\n",
        json!({ "execute": command, "arguments": arguments })
    )
}

fn parse(line: &str) -> Result<Message> {
    serde_json::from_str(line).with_context(|| format!("QEMU's monitor said {line:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_four_kinds_of_message_are_told_apart() {
        let greeting = r#"{"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": ["oob"]}}"#;
        assert!(matches!(parse(greeting).unwrap(), Message::Greeting { .. }));
        let nothing = json!({});
        assert_eq!(
            parse(r#"{"return": {}}"#).unwrap(),
            Message::Return { value: nothing }
        );
        let error = parse(r#"{"error": {"class": "GenericError", "desc": "no"}}"#).unwrap();
        let desc = "no".to_owned();
        assert_eq!(
            error,
            Message::Error {
                error: Problem { desc }
            }
        );
        assert!(parse(r#"{"id": 1}"#).is_err());
    }

    #[test]
    fn an_event_has_its_time() {
        let stop =
            r#"{"timestamp": {"seconds": 1700000000, "microseconds": 250}, "event": "STOP"}"#;
        let Message::Event(event) = parse(stop).unwrap() else {
            panic!("an event was expected");
        };
        assert_eq!(event.name, "STOP");
        assert_eq!(event.time(), Duration::new(1_700_000_000, 250_000));
    }

    #[test]
    fn events_that_come_before_a_result_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let monitor = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let stop = r#"{"timestamp": {"seconds": 5, "microseconds": 0}, "event": "STOP"}"#;
            writeln!(stream, r#"{{"QMP": {{}}}}"#).unwrap();
            let mut requests = BufReader::new(stream.try_clone().unwrap()).lines();
            for answer in [r#"{"return": {}}"#, &format!("{stop}\n{{\"return\": 7}}")] {
                requests.next().unwrap().unwrap();
                writeln!(stream, "{answer}").unwrap();
            }
        });
        let mut qmp = Qmp::connect(&path).unwrap();
        assert_eq!(qmp.execute("stop", json!({})).unwrap(), 7);
        let stopped = qmp.wait_for(|event| Ok((event.name == "STOP").then(|| event.time())));
        assert_eq!(stopped.unwrap(), Duration::from_secs(5));
        monitor.join().unwrap();
        let gone = qmp.execute("cont", json!({})).unwrap_err();
        assert!(!gone.to_string().is_empty());
    }
}
