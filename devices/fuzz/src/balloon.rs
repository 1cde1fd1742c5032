//! The balloon, with the guest's own memory behind it.

use std::{slice, sync::Arc, time::Duration};

use devices::virtio::{
    MmioTransport, VirtioDevice,
    balloon::{Balloon, BalloonControl, BalloonOptions},
};
use fuzz_harness::Input;
use memory::{GuestMemory, HOLE_START, Layout, MachineMemory};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INTERRUPT_STATUS,
};
use vm_memory::{Bytes, GuestAddress};

use crate::{
    Bench, Part, Subject,
    guest::{any_parts, get},
    memory_map::PIECES,
};

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATISTICS: u16 = 2;
const REPORTING: u16 = 3;

const PAGE: u64 = 4096;
/// Pages that no driver here uses for itself.
const FREE: u64 = 16 << 20;

thread_local! {
    /// The hole of a machine is in it, so that memory is where it is for other devices.
    static MACHINE: MachineMemory = {
        let bytes = HOLE_START + PIECES[2].1 as u64;
        let layout = Layout::new(bytes).expect("it is a size that a machine can have");
        MachineMemory::zeroed(layout).expect("there is room")
    };
}

/// A machine's memory, of which pages are given back.
pub struct Pages {
    options: BalloonOptions,
    control: Option<Arc<BalloonControl>>,
}

impl Subject for Pages {
    fn memory() -> GuestMemory {
        MACHINE.with(|machine| {
            let all = machine.discarder().discard(0..u64::MAX);
            all.expect("the host takes pages back");
            machine.guest().clone()
        })
    }

    fn new(input: &mut Input<'_>) -> Self {
        let how = input.byte();
        let options = BalloonOptions {
            target_pages: u32::from(how),
            deflate_on_oom: how & 1 != 0,
            free_page_reporting: how & 2 != 0,
            statistics_interval_s: u32::from(how & 4),
        };
        Self {
            options,
            control: None,
        }
    }

    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let discarder = MACHINE.with(MachineMemory::discarder);
        let balloon = Balloon::new(self.options, discarder).expect("there are descriptors");
        self.control = Some(Arc::clone(balloon.control()));
        Box::new(balloon)
    }

    fn compose(&mut self, queue: u16, input: &mut Input<'_>) -> Vec<Part> {
        match (queue, input.byte()) {
            (_, 240..) => any_parts(input),
            (STATISTICS, count) => {
                let entry = |_| {
                    let tag = u16::from(input.byte() % 16).to_le_bytes();
                    [&tag[..], &input.long().to_le_bytes()].concat()
                };
                vec![Part::Out((0..count % 16).flat_map(entry).collect())]
            }
            (REPORTING, count) => (0..=count % 8).map(|_| Part::In(range(input))).collect(),
            (_, count) => {
                let numbers = (0..=count).flat_map(|_| page(input).to_le_bytes());
                vec![Part::Out(numbers.collect())]
            }
        }
    }

    /// The host wants something else, or asks.
    fn outside(&mut self, transport: &MmioTransport, input: &mut Input<'_>) {
        let control = self.control();
        match input.byte() % 4 {
            0 => control.set_target(input.word()),
            1 => control.set_statistics_interval(input.byte().into()),
            2 => {
                control.ask(Duration::ZERO);
            }
            _ => {
                // The loop has heard of the target.
                transport.serve(INFLATE.into());
            }
        }
    }

    fn prove(&mut self, bench: &mut Bench) {
        let control = Arc::clone(self.control());
        // The driver is told of a target, once it has been told of what was before.
        bench.device().serve(INFLATE.into());
        let target = control.status().target_pages.wrapping_add(1);
        control.set_target(target);
        bench.device().serve(INFLATE.into());
        assert_eq!(get(bench.device(), VIRTIO_MMIO_CONFIG), target);
        let causes = get(bench.device(), VIRTIO_MMIO_INTERRUPT_STATUS);
        assert_ne!(causes & VIRTIO_MMIO_INT_CONFIG, 0, "it is not told");

        // A page that is given away is zero, and its neighbour is not.
        let free = [FREE, FREE + PAGE].map(GuestAddress);
        for page in free {
            bench.guest.store(page.0, 7u8);
        }
        let number = Part::Out(((FREE / PAGE) as u32).to_le_bytes().to_vec());
        assert_eq!(
            bench.request(INFLATE, slice::from_ref(&number)),
            (0, Vec::new())
        );
        let bytes = free.map(|page| bench.guest.memory.read_obj::<u8>(page));
        assert_eq!(bytes.map(|byte| byte.expect("it is in memory")), [0, 7]);
        assert_eq!(bench.request(DEFLATE, &[number]), (0, Vec::new()));
        let (len, _) = bench.request(REPORTING, &[Part::In(2 * PAGE as u32)]);
        assert_eq!(len, 0);

        // What a guest tells is known, and it has its buffer back when it is asked again.
        let entry = [&4u16.to_le_bytes()[..], &1234u64.to_le_bytes()].concat();
        let offered = bench.offer(STATISTICS, &[Part::Out(entry)]);
        let (_, told) = control.status().statistics.expect("it was told");
        assert_eq!(told, [("free_bytes", 1234)]);
        control.ask(Duration::ZERO);
        bench.device().serve(STATISTICS.into());
        assert_eq!(bench.guest.outcome(&offered), Some((0, Vec::new())));
    }
}

impl Pages {
    fn control(&self) -> &Arc<BalloonControl> {
        self.control.as_ref().expect("there is a device")
    }
}

/// The number of a page: one with tables or buffers, one near the end of a piece of memory, or any.
fn page(input: &mut Input<'_>) -> u32 {
    match input.byte() {
        0..160 => u32::from(input.byte() % 64),
        160..200 => {
            let (start, bytes) = input.one_of(&PIECES);
            let end = (start + bytes as u64) / PAGE;
            (end as u32).wrapping_sub(u32::from(input.byte() % 4))
        }
        200..240 => input.half().into(),
        _ => input.word(),
    }
}

/// Bytes of a range that is reported free.
fn range(input: &mut Input<'_>) -> u32 {
    match input.byte() {
        pages @ 0..200 => u32::from(pages % 64) * PAGE as u32,
        200..240 => input.half().into(),
        _ => input.word(),
    }
}
