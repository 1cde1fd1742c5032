//! The virtio console, with who types and with what takes its output.

use std::{
    io::{self, Write},
    sync::{Arc, Mutex},
};

use devices::{
    InputPort,
    virtio::{MmioTransport, VirtioDevice, console::Console},
};
use fuzz_harness::Input;

use crate::{Bench, Part, Subject, guest::any_parts};

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// What the device keeps of what is typed, at most.
const TYPED_BYTES: usize = 4096;

/// The console's two ends.
pub struct Terminal {
    output: Output,
    input: Option<Arc<dyn InputPort>>,
}

/// What was written: how much, and the last of it.
#[derive(Clone, Default)]
struct Output(Arc<Mutex<(u64, Vec<u8>)>>);

impl Output {
    fn bytes(&self) -> u64 {
        self.0.lock().expect("nobody panics with it").0
    }

    fn last(&self) -> Vec<u8> {
        self.0.lock().expect("nobody panics with it").1.clone()
    }
}

impl Write for Output {
    /// Takes all but some of the longer ones.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut written = self.0.lock().expect("nobody panics with it");
        let taken = match bytes.len() {
            1000..2000 => return Err(io::ErrorKind::BrokenPipe.into()),
            len @ 2000..3000 => len / 2,
            len => len,
        };
        written.0 += taken as u64;
        written.1 = bytes[taken.saturating_sub(16)..taken].to_vec();
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Subject for Terminal {
    fn new(_input: &mut Input<'_>) -> Self {
        Self {
            output: Output::default(),
            input: None,
        }
    }

    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let sink = Box::new(self.output.clone());
        let console = Console::new(sink).expect("there are descriptors");
        self.input = Some(console.input());
        Box::new(console)
    }

    fn compose(&mut self, queue: u16, input: &mut Input<'_>) -> Vec<Part> {
        match (queue, input.byte()) {
            (_, 240..) => any_parts(input),
            (RECEIVE, count) => (0..=count % 4)
                .map(|_| Part::In(u32::from(input.half() & 0x1fff)))
                .collect(),
            // Up to several rounds' worth, in few buffers or many.
            (_, count) => {
                let len = usize::from(input.half());
                let text = |_| Part::Out(vec![b'g'; len]);
                (0..=count % 8).map(text).collect()
            }
        }
    }

    /// Somebody types, or the loop has heard of it.
    fn outside(&mut self, transport: &MmioTransport, input: &mut Input<'_>) {
        let port = self.input();
        let room = port.input_room();
        let len = usize::from(input.half() & 0x1fff);
        let taken = port.input(&vec![b't'; len]);
        assert_eq!(taken, len.min(room), "it keeps more or less than it said");
        assert!(port.input_room() <= TYPED_BYTES - taken);
        if input.flag() {
            transport.serve(RECEIVE.into());
        }
    }

    fn prove(&mut self, bench: &mut Bench) {
        // What was typed before is the first that the driver gets.
        let port = Arc::clone(self.input());
        let kept = TYPED_BYTES - port.input_room();
        if kept > 0 {
            let (len, _) = bench.request(RECEIVE, &[Part::In(TYPED_BYTES as u32)]);
            assert_eq!(len as usize, kept, "it is not all given");
        }
        let offered = bench.offer(RECEIVE, &[Part::In(2), Part::In(100)]);
        assert!(bench.guest.outcome(&offered).is_none());
        assert_eq!(port.input(b"hello"), 5);
        bench.device().serve(RECEIVE.into());
        let (len, got) = bench.guest.outcome(&offered).expect("it is not given");
        assert_eq!(
            (len, &got[0][..], &got[1][..3]),
            (5, &b"he"[..], &b"llo"[..])
        );

        let before = self.output.bytes();
        let parts = [Part::Out(b"what is ".to_vec()), Part::Out(b"said".to_vec())];
        bench.request(TRANSMIT, &parts);
        assert_eq!(self.output.bytes(), before + 12, "it is not written once");
        assert_eq!(self.output.last(), b"what is said");
    }
}

impl Terminal {
    fn input(&self) -> &Arc<dyn InputPort> {
        self.input.as_ref().expect("there is a device")
    }
}
