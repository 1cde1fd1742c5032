//! What a machine's CPUs are: a level, or a template in a file of TOML or JSON.
//!
//! The schema of templates is published as `docs/cpu-template.schema.json`.

use std::{
    borrow::Cow,
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::{Context, bail};
use control::{CpuModel, CpuTemplate, CpuidChange, CpuidRegister, MsrChange};
use hypervisor::CpuLevel;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer,
    de::{self, Visitor},
};

use crate::text_file;

/// What a machine's CPUs are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Cpu {
    /// All that the host has.
    #[default]
    Host,
    /// Level 2 of the x86-64 psABI: SSE4.2.
    V2,
    /// Level 3: AVX2.
    V3,
    /// What the template in this file makes of one of them.
    Template(PathBuf),
}

/// What is not a file, and how it is called.
const LEVELS: [(&str, Cpu, CpuModel); 3] = [
    ("host", Cpu::Host, CpuModel::Host),
    ("x86-64-v2", Cpu::V2, CpuModel::V2),
    ("x86-64-v3", Cpu::V3, CpuModel::V3),
];

impl FromStr for Cpu {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let level = LEVELS.iter().find(|(name, ..)| *name == text);
        Ok(level.map_or_else(|| Self::Template(text.into()), |(_, cpu, _)| cpu.clone()))
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
        let levels = LEVELS.map(|(name, ..)| name);
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
            _ => None,
        }
    }

    /// As the hypervisor knows it; a template is read.
    pub(crate) fn template(&self) -> anyhow::Result<hypervisor::CpuTemplate> {
        let of = |level| hypervisor::CpuTemplate {
            level,
            ..Default::default()
        };
        Ok(match self {
            Self::Host => of(CpuLevel::Host),
            Self::V2 => of(CpuLevel::V2),
            Self::V3 => of(CpuLevel::V3),
            Self::Template(path) => Template::read(path)?.of_hypervisor(),
        })
    }

    /// As a VMM is told of it; a template is read.
    pub(crate) fn model(&self) -> anyhow::Result<CpuModel> {
        if let Self::Template(path) = self {
            let template = Template::read(path)?;
            return Ok(CpuModel::Template(Box::new(template.into())));
        }
        let level = LEVELS.into_iter().find(|(_, cpu, _)| cpu == self);
        Ok(level.map(|(.., model)| model).unwrap_or_default())
    }
}

/// A CPU template: a level, and what is changed of it.
#[derive(Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "A CPU template, for `fermata run --cpu`")]
struct Template {
    /// What is changed.
    #[serde(default)]
    base: Base,
    /// Changes of CPUID, in this order.
    #[serde(default)]
    cpuid: Vec<Cpuid>,
    /// Changes of what model-specific registers have when a vCPU begins.
    #[serde(default)]
    msr: Vec<Msr>,
}

/// What is changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
enum Base {
    /// All that the host has.
    #[default]
    #[serde(rename = "host")]
    Host,
    /// Level 2 of the x86-64 psABI: SSE4.2.
    #[serde(rename = "x86-64-v2")]
    V2,
    /// Level 3: AVX2.
    #[serde(rename = "x86-64-v3")]
    V3,
}

/// A change of one register of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Cpuid {
    /// The leaf.
    leaf: Bits<u32>,
    /// The sub-leaf, where there are some.
    #[serde(default)]
    subleaf: Bits<u32>,
    /// The register.
    register: Register,
    /// Bits that guests are not shown.
    #[serde(default)]
    clear: Bits<u32>,
    /// Bits that they are shown, which the host must have.
    #[serde(default)]
    set: Bits<u32>,
}

/// A register in which CPUID answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A change of a model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Msr {
    /// Its number.
    index: Bits<u32>,
    /// Bits that are cleared.
    #[serde(default)]
    clear: Bits<u64>,
    /// Bits that are set.
    #[serde(default)]
    set: Bits<u64>,
}

/// A number; or its text with `0x` before it, which JSON has no other way to say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Bits<T>(T);

impl<'de, T: TryFrom<u64>> Deserialize<'de> for Bits<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(BitsVisitor(std::marker::PhantomData))
    }
}

struct BitsVisitor<T>(std::marker::PhantomData<T>);

impl<T: TryFrom<u64>> Visitor<'_> for BitsVisitor<T> {
    type Value = Bits<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = 8 * size_of::<T>();
        write!(
            f,
            "a number of {bits} bits, or its text in hexadecimal as in \"0x1f\""
        )
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Self::Value, E> {
        let fits = T::try_from(value);
        fits.map(Bits)
            .map_err(|_| E::invalid_value(de::Unexpected::Unsigned(value), &self))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Self::Value, E> {
        match u64::try_from(value) {
            Ok(value) => self.visit_u64(value),
            Err(_) => Err(E::invalid_value(de::Unexpected::Signed(value), &self)),
        }
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
        let digits = text
            .strip_prefix("0x")
            .map(|digits| digits.replace('_', ""));
        match digits.and_then(|digits| u64::from_str_radix(&digits, 16).ok()) {
            Some(value) => self.visit_u64(value),
            None => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
        }
    }
}

impl<T> JsonSchema for Bits<T> {
    fn schema_name() -> Cow<'static, str> {
        format!("Bits{}", 8 * size_of::<T>()).into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let most = u64::MAX >> (64 - 8 * size_of::<T>());
        json_schema!({
            "description": "A number, or its text in hexadecimal.",
            "anyOf": [
                {"type": "integer", "minimum": 0, "maximum": most},
                {"type": "string", "pattern": "^0x[0-9a-fA-F_]+$"},
            ],
        })
    }
}

impl Template {
    fn read(path: &Path) -> anyhow::Result<Self> {
        if !path.exists() {
            let levels = LEVELS.map(|(name, ..)| name).join(", ");
            bail!(
                "{} is neither a level of CPUs nor a file; the levels are {levels}",
                path.display()
            );
        }
        let template: Self = text_file::read(path)?;
        template
            .check()
            .with_context(|| format!("{}", path.display()))?;
        Ok(template)
    }

    /// Whether each change says one thing.
    fn check(&self) -> anyhow::Result<()> {
        for Cpuid {
            leaf, clear, set, ..
        } in &self.cpuid
        {
            if clear.0 & set.0 != 0 {
                bail!(
                    "CPUID leaf {:#x}: {:#x} is both cleared and set",
                    leaf.0,
                    clear.0 & set.0
                );
            }
        }
        for Msr { index, clear, set } in &self.msr {
            if clear.0 & set.0 != 0 {
                bail!(
                    "MSR {:#x}: {:#x} is both cleared and set",
                    index.0,
                    clear.0 & set.0
                );
            }
        }
        Ok(())
    }
}

impl Template {
    fn of_hypervisor(self) -> hypervisor::CpuTemplate {
        let Self { base, cpuid, msr } = self;
        let cpuid = cpuid.into_iter().map(|change| hypervisor::CpuidChange {
            leaf: change.leaf.0,
            subleaf: change.subleaf.0,
            register: match change.register {
                Register::Eax => hypervisor::Register::Eax,
                Register::Ebx => hypervisor::Register::Ebx,
                Register::Ecx => hypervisor::Register::Ecx,
                Register::Edx => hypervisor::Register::Edx,
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
                Base::Host => CpuLevel::Host,
                Base::V2 => CpuLevel::V2,
                Base::V3 => CpuLevel::V3,
            },
            cpuid: cpuid.collect(),
            msrs: msrs.collect(),
        }
    }
}

impl From<Template> for CpuTemplate {
    fn from(Template { base, cpuid, msr }: Template) -> Self {
        let cpuid = cpuid.into_iter().map(|change| CpuidChange {
            leaf: change.leaf.0,
            subleaf: change.subleaf.0,
            register: match change.register {
                Register::Eax => CpuidRegister::Eax,
                Register::Ebx => CpuidRegister::Ebx,
                Register::Ecx => CpuidRegister::Ecx,
                Register::Edx => CpuidRegister::Edx,
            },
            clear: change.clear.0,
            set: change.set.0,
        });
        let msrs = msr.into_iter().map(|change| MsrChange {
            index: change.index.0,
            clear: change.clear.0,
            set: change.set.0,
        });
        Self {
            base: match base {
                Base::Host => CpuModel::Host,
                Base::V2 => CpuModel::V2,
                Base::V3 => CpuModel::V3,
            },
            cpuid: cpuid.collect(),
            msrs: msrs.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may")]

    use std::fs;

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
        let expected = CpuTemplate {
            base: CpuModel::V3,
            cpuid: vec![CpuidChange {
                leaf: 1,
                subleaf: 0,
                register: CpuidRegister::Ecx,
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
            wrong.ends_with("CPUID leaf 0x1: 0x2000000 is both cleared and set"),
            "{wrong}"
        );
    }

    #[test]
    fn what_is_neither_a_level_nor_a_file_is_refused() {
        let Ok(cpu) = "x86-64-v9".parse::<Cpu>();
        let error = cpu.model().unwrap_err().to_string();
        assert!(error.contains("x86-64-v3"), "{error}");
        for (name, cpu, model) in LEVELS {
            assert_eq!(name.parse(), Ok(cpu.clone()));
            assert_eq!(cpu.model().unwrap(), model);
        }
    }

    #[test]
    fn the_published_schema_is_the_current_one() {
        let schema = schemars::schema_for!(Template);
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
