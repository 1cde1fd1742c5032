//! A client of the REST front end.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use api_types::Vm;
use serde_json::{Value, json};
use ureq::Agent;

/// Longer than any snapshot takes, however slow the machine.
const TIMEOUT: Duration = Duration::from_secs(300);

/// An answer: its status, and its body if that is JSON.
#[derive(Debug)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The body.
    pub body: Value,
}

/// What identifies a machine to its clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Process id of its VMM.
    pub pid: u32,
    /// Port of its control service.
    pub port: u16,
}

/// A client of one server.
#[derive(Clone, Debug)]
pub struct Client {
    agent: Agent,
    base: String,
}

impl Client {
    /// A client of the server on loopback port `port`.
    pub fn new(port: u16) -> Self {
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(TIMEOUT))
            .build();
        Self {
            agent: agent.into(),
            base: format!("http://127.0.0.1:{port}"),
        }
    }

    /// What its paths are appended to.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Sends `body` as it is.
    ///
    /// # Errors
    ///
    /// When there is no answer.
    pub fn post_raw(&self, path: &str, body: &str) -> Result<Answer> {
        let request = self.agent.post(format!("{}{path}", self.base));
        let mut response = request
            .content_type("application/json")
            .send(body)
            .with_context(|| format!("no answer to POST {path}"))?;
        answer(
            response.status().as_u16(),
            &response.body_mut().read_to_string()?,
        )
    }

    /// Sends `body` as JSON.
    ///
    /// # Errors
    ///
    /// When there is no answer.
    pub fn post(&self, path: &str, body: &Value) -> Result<Answer> {
        self.post_raw(path, &body.to_string())
    }

    /// Asks for `path`.
    ///
    /// # Errors
    ///
    /// When there is no answer.
    pub fn get(&self, path: &str) -> Result<Answer> {
        let request = self.agent.get(format!("{}{path}", self.base));
        let mut response = request
            .call()
            .with_context(|| format!("no answer to GET {path}"))?;
        answer(
            response.status().as_u16(),
            &response.body_mut().read_to_string()?,
        )
    }

    /// Sends `body` as JSON, to change what is at `path`.
    ///
    /// # Errors
    ///
    /// When there is no answer.
    pub fn patch(&self, path: &str, body: &Value) -> Result<Answer> {
        let request = self.agent.patch(format!("{}{path}", self.base));
        let mut response = request
            .content_type("application/json")
            .send(body.to_string())
            .with_context(|| format!("no answer to PATCH {path}"))?;
        answer(
            response.status().as_u16(),
            &response.body_mut().read_to_string()?,
        )
    }

    /// Deletes `path`.
    ///
    /// # Errors
    ///
    /// When there is no answer.
    pub fn delete(&self, path: &str) -> Result<Answer> {
        let request = self.agent.delete(format!("{}{path}", self.base));
        let mut response = request
            .call()
            .with_context(|| format!("no answer to DELETE {path}"))?;
        answer(
            response.status().as_u16(),
            &response.body_mut().read_to_string()?,
        )
    }

    /// `POST /create` of a fresh machine, with what the contract asks for and `more`.
    ///
    /// # Errors
    ///
    /// When it is not created.
    pub fn boot(&self, kernel: &str, more: &Value) -> Result<Machine> {
        let mut body = json!({
            "cpu_snapshot_path": "",
            "memory_snapshot_path": "",
            "kernel_path": kernel,
            "resume": false,
        });
        if let (Some(body), Some(more)) = (body.as_object_mut(), more.as_object()) {
            body.extend(more.clone());
        }
        machine(&self.post("/create", &body)?)
    }

    /// `POST /create` of a machine from a snapshot.
    ///
    /// # Errors
    ///
    /// When it is not restored.
    pub fn restore(&self, state: &str, memory: &str) -> Result<Machine> {
        machine(&self.try_restore(state, memory)?)
    }

    /// The same, with its clocks as told: `stand-still` or `follow`.
    ///
    /// # Errors
    ///
    /// When it is not restored.
    pub fn restore_clocked(&self, state: &str, memory: &str, clock: &str) -> Result<Machine> {
        let body = json!({
            "cpu_snapshot_path": state,
            "memory_snapshot_path": memory,
            "resume": true,
            "clock": clock,
        });
        machine(&self.post("/create", &body)?)
    }

    /// The same, whatever the answer.
    ///
    /// # Errors
    ///
    /// When there is no answer.
    pub fn try_restore(&self, state: &str, memory: &str) -> Result<Answer> {
        let body = json!({
            "cpu_snapshot_path": state,
            "memory_snapshot_path": memory,
            "kernel_path": "",
            "resume": true,
        });
        self.post("/create", &body)
    }

    /// `POST /snapshot`.
    ///
    /// # Errors
    ///
    /// When it is not taken.
    pub fn snapshot(
        &self,
        machine: Machine,
        state: &str,
        memory: &str,
        resume: bool,
    ) -> Result<()> {
        let answer = self.try_snapshot(machine.port, state, memory, resume)?;
        ensure!(
            answer.status == 200 && answer.body == "Snapshot Taken Successfully",
            "the snapshot was answered by {answer:?}"
        );
        Ok(())
    }

    /// The same, whatever the answer.
    ///
    /// # Errors
    ///
    /// When there is no answer.
    pub fn try_snapshot(
        &self,
        port: u16,
        state: &str,
        memory: &str,
        resume: bool,
    ) -> Result<Answer> {
        let body = json!({
            "cpu_snapshot_path": state,
            "memory_snapshot_path": memory,
            "rpc_port": port,
            "resume": resume,
        });
        self.post("/snapshot", &body)
    }

    /// `GET /vms/<pid>`.
    ///
    /// # Errors
    ///
    /// When it is not known.
    pub fn vm(&self, pid: u32) -> Result<Vm> {
        let answer = self.get(&format!("/vms/{pid}"))?;
        ensure!(answer.status == 200, "machine {pid}: {answer:?}");
        Ok(serde_json::from_value(answer.body)?)
    }
}

fn answer(status: u16, body: &str) -> Result<Answer> {
    let body = serde_json::from_str(body)
        .with_context(|| format!("an answer of status {status} is no JSON: {body:?}"))?;
    Ok(Answer { status, body })
}

fn machine(answer: &Answer) -> Result<Machine> {
    let number = |name: &str| answer.body.get(name).and_then(Value::as_u64);
    match (answer.status, number("pid"), number("port")) {
        (200, Some(pid), Some(port)) => Ok(Machine {
            pid: pid.try_into()?,
            port: port.try_into()?,
        }),
        _ => anyhow::bail!("the machine was not created: {answer:?}"),
    }
}
