//! What a machine's CPUs are: a level, or a template in a file of TOML or JSON.
//!
//! The schema of templates is published as `docs/cpu-template.schema.json`.

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::{Context, bail};
use api_types::{CpuLevel, CpuTemplate, CpuidRegister};
use control::CpuModel;
use hypervisor::Register;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer};

use crate::text_file;

/// What a machine's CPUs are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Cpu {
    /// What all hosts of a level have.
    Level(CpuLevel),
    /// What the template in this file makes of one.
    Template(PathBuf),
}

/// The levels, and how they are called.
const LEVELS: [(&str, CpuLevel); 3] = [
    ("host", CpuLevel::Host),
    ("x86-64-v2", CpuLevel::V2),
    ("x86-64-v3", CpuLevel::V3),
];

impl Default for Cpu {
    fn default() -> Self {
        Self::Level(CpuLevel::default())
    }
}

impl FromStr for Cpu {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let level = LEVELS.iter().find(|(name, _)| *name == text);
        Ok(level.map_or_else(
            || Self::Template(text.into()),
            |(_, level)| Self::Level(*level),
        ))
    }
}

impl<'de> Deserialize<'de> for Cpu {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        let Ok(cpu) = text.parse();
        Ok(cpu)
    }
}

impl JsonSchema for Cpu {
    fn schema_name() -> Cow<'static, str> {
        "Cpu".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let levels = LEVELS.map(|(name, _)| name);
        json_schema!({
            "description": "What a machine's CPUs are: all that the host has, a level of the x86-64 psABI, or the path of a template (cpu-template.schema.json).",
            "type": "string",
            "examples": levels,
        })
    }
}

impl Cpu {
    /// The file that it is in, if it is in one.
    pub(crate) fn file_mut(&mut self) -> Option<&mut PathBuf> {
        match self {
            Self::Template(path) => Some(path),
            Self::Level(_) => None,
        }
    }

    /// As the hypervisor knows it; a template is read.
    pub(crate) fn template(&self) -> anyhow::Result<hypervisor::CpuTemplate> {
        Ok(of_hypervisor(match self {
            Self::Level(level) => CpuTemplate {
                base: *level,
                ..CpuTemplate::default()
            },
            Self::Template(path) => read(path)?,
        }))
    }

    /// As a VMM is told of it; a template is read.
    pub(crate) fn model(&self) -> anyhow::Result<CpuModel> {
        Ok(api_server::cpu_model(match self {
            Self::Level(level) => api_types::CpuModel::Level(*level),
            Self::Template(path) => api_types::CpuModel::Template(read(path)?),
        }))
    }
}

/// Reads a template.
fn read(path: &Path) -> anyhow::Result<CpuTemplate> {
    if !path.exists() {
        let levels = LEVELS.map(|(name, _)| name).join(", ");
        bail!(
            "{} is neither a level of CPUs nor a file; the levels are {levels}",
            path.display()
        );
    }
    let template: CpuTemplate = text_file::read(path)?;
    template
        .check()
        .with_context(|| format!("{}", path.display()))?;
    Ok(template)
}

fn of_hypervisor(template: CpuTemplate) -> hypervisor::CpuTemplate {
    let CpuTemplate { base, cpuid, msr } = template;
    let cpuid = cpuid.into_iter().map(|change| hypervisor::CpuidChange {
        leaf: change.leaf.0,
        subleaf: change.subleaf.0,
        register: match change.register {
            CpuidRegister::Eax => Register::Eax,
            CpuidRegister::Ebx => Register::Ebx,
            CpuidRegister::Ecx => Register::Ecx,
            CpuidRegister::Edx => Register::Edx,
        },
        clear: change.clear.0,
        set: change.set.0,
    });
    let msrs = msr.into_iter().map(|change| hypervisor::MsrChange {
        index: change.index.0,
        clear: change.clear.0,
        set: change.set.0,
    });
    hypervisor::CpuTemplate {
        level: match base {
            CpuLevel::Host => hypervisor::CpuLevel::Host,
            CpuLevel::V2 => hypervisor::CpuLevel::V2,
            CpuLevel::V3 => hypervisor::CpuLevel::V3,
        },
        cpuid: cpuid.collect(),
        msrs: msrs.collect(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may")]

    use std::fs;

    use control::{CpuidChange, MsrChange};

    use super::*;

    const COMMITTED: &str = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../docs/cpu-template.schema.json"
    );
    const WRITE: &str = "FERMATA_WRITE_SCHEMA";

    const TOML: &str = "base = \"x86-64-v3\"\n[[cpuid]]\nleaf = 1\nregister = \"ecx\"\nset = 0x0200_0000\n\
        [[msr]]\nindex = 0x10a\nclear = \"0x8000_0000_0000_0000\"\n";

    fn read(name: &str, text: &str) -> anyhow::Result<CpuModel> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join(name);
        fs::write(&path, text)?;
        Cpu::Template(path).model()
    }

    fn refused(name: &str, text: &str) -> String {
        let error = format!("{:#}", read(name, text).unwrap_err());
        error.split_once(name).unwrap().1.to_owned()
    }

    #[test]
    fn toml_and_json_say_the_same() {
        let json = r#"{"base": "x86-64-v3",
            "cpuid": [{"leaf": "0x1", "subleaf": 0, "register": "ecx", "set": 33554432}],
            "msr": [{"index": "0x10a", "clear": 9223372036854775808}]}"#;
        let model = read("t.toml", TOML).unwrap();
        assert_eq!(model, read("t.json", json).unwrap());
        let expected = control::CpuTemplate {
            base: CpuModel::V3,
            cpuid: vec![CpuidChange {
                leaf: 1,
                subleaf: 0,
                register: control::CpuidRegister::Ecx,
                clear: 0,
                set: 1 << 25,
            }],
            msrs: vec![MsrChange {
                index: 0x10a,
                clear: 1 << 63,
                set: 0,
            }],
        };
        assert_eq!(model, CpuModel::Template(Box::new(expected)));
    }

    #[test]
    fn errors_point_at_line_and_key() {
        for (from, to, place) in [
            ("leaf", "leave", ":3:1: unknown field `leave`"),
            ("ecx", "rcx", ":4:12: unknown variant `rcx`"),
            (
                "0x0200_0000",
                "0x1_0000_0000",
                ":5:7: invalid value: integer `4294967296`, expected a number of 32 bits",
            ),
            ("0x0200_0000", "-1", ":5:7: invalid value: integer `-1`"),
            (
                "0x8000_0000_0000_0000",
                "8",
                ":8:9: invalid value: string \"8\", expected a number of 64 bits",
            ),
            (
                "x86-64-v3",
                "x86-64-v9",
                ":1:8: unknown variant `x86-64-v9`",
            ),
        ] {
            let wrong = refused("t.toml", &TOML.replace(from, to));
            assert!(wrong.starts_with(place), "{wrong}");
        }
        let wrong = refused("t.json", "{\"cpuid\":\n [{\"leaf\": 1, \"register\": 5}]}");
        assert!(wrong.starts_with(":2:"), "{wrong}");
        let both = TOML.replace("set =", "clear = 0xffff_ffff\nset =");
        let wrong = refused("t.toml", &both);
        assert!(
            wrong.ends_with("CPUID leaf 0x1: 0x2000000 is both cleared and set; leave one out"),
            "{wrong}"
        );
    }

    #[test]
    fn what_is_neither_a_level_nor_a_file_is_refused() {
        let Ok(cpu) = "x86-64-v9".parse::<Cpu>();
        let error = cpu.model().unwrap_err().to_string();
        assert!(error.contains("x86-64-v3"), "{error}");
        for ((name, level), model) in
            LEVELS
                .into_iter()
                .zip([CpuModel::Host, CpuModel::V2, CpuModel::V3])
        {
            let Ok(cpu) = name.parse::<Cpu>();
            assert_eq!(cpu, Cpu::Level(level));
            assert_eq!(cpu.model().unwrap(), model);
        }
    }

    #[test]
    fn the_published_schema_is_the_current_one() {
        let schema = schemars::schema_for!(CpuTemplate);
        let current = serde_json::to_string_pretty(&schema).unwrap() + "\n";
        if std::env::var_os(WRITE).is_some() {
            fs::write(COMMITTED, &current).unwrap();
        }
        assert!(
            fs::read_to_string(COMMITTED).unwrap_or_default() == current,
            "docs/cpu-template.schema.json is not what is read; write it with \
             {WRITE}=1 cargo test -p cli schema"
        );
    }
}
