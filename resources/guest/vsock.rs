//! What guests test their vsock device with: `vsock echo PORT` gives every connection back what it sends,
//! `vsock connect CID PORT` carries standard input there and what comes back to standard output.
//!
//! Built by the test bed without cargo, so that it stands on the C library that std stands on.

use std::{env, fs::File, io, io::Write, mem, os::fd::FromRawFd, process::exit, thread};

const AF_VSOCK: i32 = 40;
const SOCK_STREAM: i32 = 1;
const SHUT_WR: i32 = 1;
const ANY: u32 = u32::MAX;

/// `struct sockaddr_vm` of linux/vm_sockets.h.
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    zero: [u8; 4],
}

unsafe extern "C" {
    fn socket(domain: i32, kind: i32, protocol: i32) -> i32;
    fn connect(fd: i32, address: *const Address, len: u32) -> i32;
    fn bind(fd: i32, address: *const Address, len: u32) -> i32;
    fn listen(fd: i32, backlog: i32) -> i32;
    fn accept(fd: i32, address: *mut Address, len: *mut u32) -> i32;
    fn shutdown(fd: i32, how: i32) -> i32;
}

fn checked(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn address(cid: u32, port: u32) -> Address {
    Address {
        family: AF_VSOCK as u16,
        reserved: 0,
        port,
        cid,
        zero: [0; 4],
    }
}

fn open() -> io::Result<i32> {
    // SAFETY: it takes and returns integers.
    checked(unsafe { socket(AF_VSOCK, SOCK_STREAM, 0) })
}

fn stream(fd: i32) -> File {
    // SAFETY: the descriptor was just made, and is nobody else's.
    unsafe { File::from_raw_fd(fd) }
}

/// Ends one direction of a connection.
fn finish(fd: i32) -> io::Result<()> {
    // SAFETY: it takes integers.
    checked(unsafe { shutdown(fd, SHUT_WR) }).map(drop)
}

fn echo(port: u32) -> io::Result<()> {
    let fd = open()?;
    let here = address(ANY, port);
    // SAFETY: `here` is an address of the length that is given, and lives through the call.
    checked(unsafe { bind(fd, &here, mem::size_of::<Address>() as u32) })?;
    // SAFETY: it takes integers.
    checked(unsafe { listen(fd, 8) })?;
    loop {
        // SAFETY: no address is asked for.
        let fd = checked(unsafe { accept(fd, std::ptr::null_mut(), std::ptr::null_mut()) })?;
        thread::spawn(move || {
            let mut stream = stream(fd);
            // An end, however it comes, ends this connection only.
            if let Ok(mut back) = stream.try_clone() {
                let _ = io::copy(&mut stream, &mut back);
            }
            let _ = finish(fd);
        });
    }
}

fn carry(cid: u32, port: u32) -> io::Result<()> {
    let fd = open()?;
    let there = address(cid, port);
    // SAFETY: as of `bind`.
    checked(unsafe { connect(fd, &there, mem::size_of::<Address>() as u32) })?;
    let mut from = stream(fd);
    let mut to = from.try_clone()?;
    let sender = thread::spawn(move || {
        io::copy(&mut io::stdin(), &mut to)?;
        finish(fd)
    });
    let received = io::copy(&mut from, &mut io::stdout());
    let sent = sender
        .join()
        .unwrap_or_else(|_| Err(io::ErrorKind::Other.into()));
    io::stdout().flush()?;
    received.and(sent)
}

fn main() {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let number = |text: &str| text.parse().unwrap_or(0);
    let done = match words[..] {
        ["echo", port] => echo(number(port)),
        ["connect", cid, port] => carry(number(cid), number(port)),
        _ => Err(io::Error::other(
            "usage: vsock echo PORT | vsock connect CID PORT",
        )),
    };
    if let Err(error) = done {
        eprintln!("vsock: {error}");
        exit(1);
    }
}
