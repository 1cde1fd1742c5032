//! What requests come to.

use std::{fs, num::NonZeroU64};

use control::{
    CpuModel, CpuTemplate, CpuidChange, CpuidRegister, DiskConfig, DiskFormat, DiskLimits,
    MsrChange, StoreLocation,
};

use super::*;

struct Bench {
    _dir: tempfile::TempDir,
    config: ServerConfig,
    tree: Tree,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["kernel", "initrd", "disk", "state", "memory"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        Self {
            config: ServerConfig::new(dir.path(), "/no/vmm"),
            tree: Tree::open(dir.path()).unwrap(),
            _dir: dir,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.tree.input("", name).unwrap()
    }

    fn create(&self, json: &str) -> Result<Plan, ApiError> {
        create(
            &self.config,
            &self.tree,
            &serde_json::from_str(json).unwrap(),
        )
    }

    fn refusal(&self, json: &str) -> (u16, String) {
        let refused = self.create(json).unwrap_err();
        (refused.code.status(), refused.message)
    }
}

#[test]
fn what_a_request_leaves_out_is_the_operators_choice() {
    let bench = Bench::new();
    let plan = bench
        .create(
            r#"{"cpu_snapshot_path": "", "memory_snapshot_path": "", "kernel_path": "kernel",
                "resume": false}"#,
        )
        .unwrap();
    let Origin::Boot(machine) = plan.origin else {
        panic!("{plan:?}")
    };
    assert_eq!(machine.kernel, bench.path("kernel"));
    assert_eq!((machine.vcpus, machine.memory_mib), (2, 256));
    assert_eq!(machine.cmdline, bench.config.defaults.cmdline);
    assert_eq!((machine.initrd, machine.disks), (None, vec![]));
    assert_eq!(plan.notes, [""; 0]);
}

#[test]
fn what_a_request_says_is_taken() {
    let mut bench = Bench::new();
    bench.config.defaults.initrd = Some("/boot/initrd".into());
    let plan = bench
        .create(
            r#"{"kernel_path": "kernel", "resume": false, "vcpus": 4, "memory_mib": 512, "cpu": "x86-64-v3",
                "initrd_path": "initrd", "cmdline": "quiet", "balloon": {"deflate_on_oom": true},
                "console_device": "virtio", "disks": [
                {"path": "disk", "write_bytes_per_second": 9}, {"path": "disk", "format": "branch", "serial": "s"}]}"#,
        )
        .unwrap();
    let expected = MachineConfig {
        vcpus: 4,
        memory_mib: 512,
        cpu: CpuModel::V3,
        kernel: bench.path("kernel"),
        initrd: Some(bench.path("initrd")),
        cmdline: "quiet".to_owned(),
        disks: vec![
            DiskConfig {
                path: bench.path("disk"),
                read_only: false,
                format: DiskFormat::Raw,
                serial: None,
                limits: DiskLimits {
                    write_bytes_per_second: NonZeroU64::new(9),
                    ..DiskLimits::default()
                },
            },
            DiskConfig {
                path: bench.path("disk"),
                read_only: false,
                format: DiskFormat::Branch,
                serial: Some("s".to_owned()),
                limits: DiskLimits::default(),
            },
        ],
        nets: Vec::new(),
        vsock: None,
        balloon: Some(BalloonConfig {
            deflate_on_oom: true,
            ..BalloonConfig::default()
        }),
        console_device: ConsoleDevice::Virtio,
    };
    assert_eq!(plan.origin, Origin::Boot(expected));
    let plan = bench
        .create(r#"{"kernel_path": "kernel", "resume": false, "initrd_path": ""}"#)
        .unwrap();
    assert!(matches!(plan.origin, Origin::Boot(machine) if machine.initrd.is_none()));
}

#[test]
fn a_template_is_taken_as_it_is_and_one_that_says_two_things_is_refused() {
    let bench = Bench::new();
    let cpu = |cpu: &str| format!(r#"{{"kernel_path": "kernel", "resume": false, "cpu": {cpu}}}"#);
    let plan = bench.create(&cpu(
        r#"{"base": "x86-64-v2", "cpuid": [{"leaf": "0x7", "subleaf": 1, "register": "edx", "set": 4}],
            "msr": [{"index": 16, "clear": "0xf000_0000_0000_0000", "set": 1}]}"#,
    ));
    let expected = CpuTemplate {
        base: CpuModel::V2,
        cpuid: vec![CpuidChange {
            leaf: 7,
            subleaf: 1,
            register: CpuidRegister::Edx,
            clear: 0,
            set: 4,
        }],
        msrs: vec![MsrChange {
            index: 16,
            clear: 0xf << 60,
            set: 1,
        }],
    };
    let Origin::Boot(machine) = plan.unwrap().origin else {
        panic!("it boots")
    };
    assert_eq!(machine.cpu, CpuModel::Template(Box::new(expected)));
    let both = cpu(r#"{"msr": [{"index": 16, "clear": 3, "set": 2}]}"#);
    let (status, said) = bench.refusal(&both);
    assert_eq!(status, 400);
    assert!(
        said.starts_with("cpu: MSR 0x10: 0x2 is both cleared and set"),
        "{said}"
    );
}

#[test]
fn resume_restores_whatever_the_kernel_path_says() {
    let bench = Bench::new();
    let plan = bench
        .create(
            r#"{"cpu_snapshot_path": "state", "memory_snapshot_path": "memory",
                "kernel_path": "/no/such/kernel", "resume": true, "vcpus": 8}"#,
        )
        .unwrap();
    let expected = Origin::Restore(Source::files(bench.path("state"), bench.path("memory")));
    assert_eq!(plan.origin, expected);
    assert_eq!(plan.notes.len(), 1);
    assert!(
        plan.notes[0].starts_with("vcpus is not used"),
        "{:?}",
        plan.notes
    );
}

#[test]
fn what_is_asked_for_and_not_done_is_noted() {
    let bench = Bench::new();
    let plan = bench
        .create(
            r#"{"kernel_path": "kernel", "resume": false, "tap_device": "vmtap100",
                "config": {"username": "u", "password": "hunter2", "id": 10}}"#,
        )
        .unwrap();
    assert_eq!(plan.notes.len(), 1);
    assert!(plan.notes[0].starts_with("config is not used"));
    assert!(!format!("{:?}", plan.notes).contains("hunter2"));
}

#[test]
fn only_a_restored_machine_has_memory_that_comes_on_demand() {
    let bench = Bench::new();
    let plan = |rest: &str| {
        let json = format!(r#"{{"on_demand": true, {rest}}}"#);
        bench.create(&json).unwrap()
    };
    let restored = r#""cpu_snapshot_path": "state", "memory_snapshot_path": "memory""#;
    let plan_of_restore = plan(&format!(r#"{restored}, "resume": true"#));
    assert!(plan_of_restore.on_demand && plan_of_restore.notes.is_empty());
    let plan_of_boot = plan(r#""kernel_path": "kernel", "resume": false"#);
    assert!(!plan_of_boot.on_demand);
    assert!(plan_of_boot.notes[0].starts_with("on_demand is not used"));
}

#[test]
fn a_working_set_is_of_memory_that_comes_on_demand() {
    let bench = Bench::new();
    let plan = |rest: &str| {
        let files = r#""cpu_snapshot_path": "state", "memory_snapshot_path": "memory""#;
        let json = format!(r#"{{{files}, "resume": true, {rest}}}"#);
        bench.create(&json).unwrap()
    };
    let usual = plan(r#""on_demand": true"#);
    assert_eq!(usual.working_set, UseWorkingSet::Bring);
    for (word, use_it) in [
        ("bring", UseWorkingSet::Bring),
        ("record", UseWorkingSet::Record),
        ("ignore", UseWorkingSet::Ignore),
    ] {
        let asked = plan(&format!(r#""on_demand": true, "working_set": "{word}""#));
        assert_eq!((asked.working_set, asked.notes.len()), (use_it, 0));
    }
    let loaded_first = plan(r#""working_set": "record""#);
    assert!(loaded_first.notes[0].starts_with("working_set is not used"));
}

#[test]
fn a_tap_device_is_attached_at_boot_and_at_restore() {
    let bench = Bench::new();
    let tap = |name: &str| NetAttachment::Tap(name.to_owned());
    let mac = "02:00:5e:10:00:01";
    let boot = |more: &str| {
        let json = format!(r#"{{"kernel_path": "kernel", "resume": false, {more}}}"#);
        match bench.create(&json).unwrap().origin {
            Origin::Boot(machine) => machine.nets,
            origin => panic!("{origin:?}"),
        }
    };
    let config = |name: &str, mac: Option<&str>| NetConfig {
        attachment: tap(name),
        mac: mac.map(|mac| mac.parse().unwrap()),
        receive_limit: RateLimit::default(),
        send_limit: RateLimit::default(),
    };
    assert_eq!(boot(r#""tap_device": "a""#), [config("a", None)]);
    assert_eq!(boot(r#""tap_device": """#), []);
    let nets = format!(r#""nets": [{{"tap_device": "a", "mac": "{mac}"}}, {{"tap_device": "b"}}]"#);
    assert_eq!(boot(&nets), [config("a", Some(mac)), config("b", None)]);

    let restore = |more: &str| {
        let json = format!(
            r#"{{"cpu_snapshot_path": "state", "memory_snapshot_path": "memory",
                "kernel_path": "", "resume": true, {more}}}"#
        );
        bench.create(&json).unwrap().net_changes
    };
    let change = |name: &str, mac: Option<&str>| NetChange {
        attachment: Some(tap(name)),
        mac: mac.map(|mac| mac.parse().unwrap()),
    };
    assert_eq!(restore(r#""tap_device": "a""#), [change("a", None)]);
    assert_eq!(restore(&nets), [change("a", Some(mac)), change("b", None)]);
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let bench = Bench::new();
    let cases = [
        (r#"{"resume": false}"#, 400, "kernel_path is missing"),
        (
            r#"{"resume": false, "kernel_path": ""}"#,
            400,
            "kernel_path is missing",
        ),
        (
            r#"{"resume": false, "kernel_path": "absent"}"#,
            404,
            "kernel_path",
        ),
        (
            r#"{"resume": false, "kernel_path": "/etc/passwd"}"#,
            400,
            "outside",
        ),
        (r#"{"resume": true}"#, 400, "cpu_snapshot_path is missing"),
        (
            r#"{"resume": true, "cpu_snapshot_path": "state"}"#,
            400,
            "memory_snapshot_path is missing",
        ),
        (
            r#"{"resume": true, "cpu_snapshot_path": "state", "memory_snapshot_path": "./state"}"#,
            400,
            "the same file",
        ),
        (
            r#"{"resume": false, "kernel_path": "kernel", "vcpus": 0}"#,
            400,
            "vcpus is 0; ask for 1 to 32",
        ),
        (
            r#"{"resume": false, "kernel_path": "kernel", "vcpus": 33}"#,
            400,
            "vcpus is 33",
        ),
        (
            r#"{"resume": false, "kernel_path": "kernel", "memory_mib": 63}"#,
            400,
            "memory_mib is 63",
        ),
        (
            r#"{"resume": false, "kernel_path": "kernel", "tap_device": "a", "nets": []}"#,
            400,
            "leave one out",
        ),
        (
            r#"{"resume": false, "kernel_path": "kernel", "nets": [{"tap_device": "a", "mac": "x"}]}"#,
            400,
            "MAC address",
        ),
        (
            r#"{"resume": false, "kernel_path": "kernel", "disks": [{"path": "../x"}]}"#,
            400,
            "disks",
        ),
    ];
    for (json, status, said) in cases {
        let (found, message) = bench.refusal(json);
        assert_eq!(found, status, "{json}: {message}");
        assert!(message.contains(said), "{json}: {message}");
    }
}

#[test]
fn more_than_any_machine_can_have_is_refused_before_it_takes_room() {
    let bench = Bench::new();
    let listed = |field: &str, each: &str, count: usize| {
        let all = vec![each; count].join(",");
        format!(r#"{{"kernel_path": "kernel", "resume": false, "{field}": [{all}]}}"#)
    };
    let (disk, net) = (r#"{"path": "disk"}"#, r#"{"tap_device": "t"}"#);
    for (field, each) in [("disks", disk), ("nets", net)] {
        assert!(bench.create(&listed(field, each, 20)).is_ok());
        let (status, message) = bench.refusal(&listed(field, each, 4000));
        assert_eq!(status, 400);
        assert!(message.contains("4000"), "{message}");
    }
    let long = "{n}".repeat(1000);
    let (status, message) = bench.refusal(&format!(
        r#"{{"kernel_path": "kernel", "resume": false, "tap_device": "{long}"}}"#
    ));
    assert_eq!(status, 400);
    assert!(!message.contains(&long), "{message}");
    let forks = format!(r#"{{"pid": 1, "nets": [{}]}}"#, vec![net; 4000].join(","));
    let refused = fork(
        &bench.config,
        &bench.tree,
        &serde_json::from_str(&forks).unwrap(),
    );
    assert_eq!(refused.unwrap_err().code, ErrorCode::BadRequest);
}

#[test]
fn a_fork_is_of_a_machine_or_of_two_files() {
    let bench = Bench::new();
    let plan = |json: &str| {
        let request = serde_json::from_str(json).unwrap();
        fork(&bench.config, &bench.tree, &request)
    };
    let running = plan(r#"{"pid": 7, "nets": [{"tap_device": "t{n}"}]}"#).unwrap();
    assert_eq!((running.of, running.count), (Forked::Machine(7), 1));
    let tap = NetAttachment::Tap("t{n}".to_owned());
    assert_eq!(running.net_changes[0].attachment, Some(tap));
    let files = r#""cpu_snapshot_path": "state", "memory_snapshot_path": "memory""#;
    let saved = plan(&format!(r#"{{{files}, "count": 512, "clock": "follow"}}"#)).unwrap();
    let source = Source::files(bench.path("state"), bench.path("memory"));
    assert_eq!(saved.of, Forked::Saved(source));
    assert_eq!((saved.count, saved.clock), (512, GuestClock::Follow));
    for (json, said) in [
        ("{}".to_owned(), "cpu_snapshot_path is missing"),
        (format!(r#"{{"pid": 7, {files}}}"#), "leave one out"),
        (
            r#"{"pid": 7, "count": 0}"#.to_owned(),
            "count is 0; ask for 1 to 512",
        ),
        (
            r#"{"pid": 7, "count": 2, "nets": [{"tap_device": "t"}]}"#.to_owned(),
            "put {n} into the name",
        ),
        (r#"{"pid": 7, "count": 513}"#.to_owned(), "count is 513"),
    ] {
        let refused = plan(&json).unwrap_err();
        assert_eq!(refused.code, ErrorCode::BadRequest);
        assert!(refused.message.contains(said), "{json}: {refused}");
    }
}

#[test]
fn a_server_with_a_store_follows_references_into_it() {
    let mut bench = Bench::new();
    let location = StoreLocation {
        directory: "/store".into(),
        key_file: None,
    };
    bench.config.store = Some(location.clone());
    let plan = bench
        .create(
            r#"{"cpu_snapshot_path": "state", "memory_snapshot_path": "memory", "resume": true}"#,
        )
        .unwrap();
    assert!(
        matches!(&plan.origin, Origin::Restore(Source::Files { store: Some(store), .. }) if *store == location),
        "{:?}",
        plan.origin
    );
}
