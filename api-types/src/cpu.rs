//! What a machine's CPUs are: a level, or a template that changes one. Requests have a template in them, and `fermata run --cpu` reads
//! the same from a file, of which `docs/cpu-template.schema.json` is the schema.

use std::{borrow::Cow, fmt, marker::PhantomData};

use schemars::{JsonSchema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{self, IntoDeserializer, MapAccess, Visitor, value::MapAccessDeserializer},
};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{
        RefOr,
        schema::{ObjectBuilder, OneOfBuilder, Schema, Type},
    },
};

/// What a machine's CPUs are: the name of a level, or a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum CpuModel {
    /// What all hosts of a level have.
    Level(CpuLevel),
    /// What the template makes of one.
    Template(CpuTemplate),
}

/// A level of CPUs.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, JsonSchema,
)]
pub enum CpuLevel {
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

/// A CPU template: a level, and what is changed of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(title = "A CPU template, for `fermata run --cpu`")]
#[schema(example = json!({"base": "x86-64-v3", "cpuid": [{"leaf": "0x1", "register": "ecx", "set": "0x0200_0000"}]}))]
pub struct CpuTemplate {
    /// What is changed.
    pub base: CpuLevel,
    /// Changes of CPUID, in this order.
    pub cpuid: Vec<CpuidChange>,
    /// Changes of what model-specific registers have when a vCPU begins.
    pub msr: Vec<MsrChange>,
}

/// A change of one register of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CpuidChange {
    /// The leaf.
    pub leaf: Bits32,
    /// The sub-leaf, where there are some.
    #[serde(default)]
    pub subleaf: Bits32,
    /// The register.
    pub register: CpuidRegister,
    /// Bits that guests are not shown.
    #[serde(default)]
    pub clear: Bits32,
    /// Bits that they are shown, which the host must have.
    #[serde(default)]
    pub set: Bits32,
}

/// A register in which CPUID answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "they are called what they are")]
pub enum CpuidRegister {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A change of a model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MsrChange {
    /// Its number.
    pub index: Bits32,
    /// Bits that are cleared.
    #[serde(default)]
    pub clear: Bits64,
    /// Bits that are set.
    #[serde(default)]
    pub set: Bits64,
}

/// A number; or its text with `0x` before it, which JSON has no other way to say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Bits<T>(pub T);

/// A register of 32 bits, or some of it.
pub type Bits32 = Bits<u32>;
/// A register of 64 bits, or some of it.
pub type Bits64 = Bits<u64>;

/// The most changes of CPUID, and of model-specific registers, that a template has: KVM has no more leaves.
const MAX_CHANGES: usize = 256;

/// What a template cannot mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTemplate {
    /// More changes than a CPU has what can be changed.
    #[error(
        "a template has at most {MAX_CHANGES} changes of CPUID and as many of MSRs, and not {0}; put those of one register into one"
    )]
    TooLong(usize),
    /// Two things of one bit of CPUID.
    #[error("CPUID leaf {leaf:#x}: {bits:#x} is both cleared and set; leave one out")]
    Cpuid {
        /// The leaf.
        leaf: u32,
        /// The bits.
        bits: u32,
    },
    /// Two things of one bit of a model-specific register.
    #[error("MSR {index:#x}: {bits:#x} is both cleared and set; leave one out")]
    Msr {
        /// Its number.
        index: u32,
        /// The bits.
        bits: u64,
    },
}

impl CpuTemplate {
    /// Whether each change says one thing, and there are not too many.
    ///
    /// # Errors
    ///
    /// [`InvalidTemplate`] names the first that does not.
    pub fn check(&self) -> Result<(), InvalidTemplate> {
        let changes = self.cpuid.len().max(self.msr.len());
        if changes > MAX_CHANGES {
            return Err(InvalidTemplate::TooLong(changes));
        }
        for change in &self.cpuid {
            let (leaf, bits) = (change.leaf.0, change.clear.0 & change.set.0);
            if bits != 0 {
                return Err(InvalidTemplate::Cpuid { leaf, bits });
            }
        }
        for change in &self.msr {
            let (index, bits) = (change.index.0, change.clear.0 & change.set.0);
            if bits != 0 {
                return Err(InvalidTemplate::Msr { index, bits });
            }
        }
        Ok(())
    }
}

// By hand: which of the two is meant can be seen, and then what is wrong with it be told.
impl<'de> Deserialize<'de> for CpuModel {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(ModelVisitor)
    }
}

struct ModelVisitor;

impl<'de> Visitor<'de> for ModelVisitor {
    type Value = CpuModel;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a level of CPUs, or a template as an object")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<CpuModel, E> {
        CpuLevel::deserialize(name.into_deserializer()).map(CpuModel::Level)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<CpuModel, A::Error> {
        CpuTemplate::deserialize(MapAccessDeserializer::new(map)).map(CpuModel::Template)
    }
}

impl<'de, T: TryFrom<u64>> Deserialize<'de> for Bits<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(BitsVisitor(PhantomData))
    }
}

struct BitsVisitor<T>(PhantomData<T>);

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

const DESCRIPTION: &str = "A number, or its text in hexadecimal.";
const HEXADECIMAL: &str = "^0x[0-9a-fA-F_]+$";

impl<T> JsonSchema for Bits<T> {
    fn schema_name() -> Cow<'static, str> {
        format!("Bits{}", 8 * size_of::<T>()).into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> schemars::Schema {
        json_schema!({
            "description": DESCRIPTION,
            "anyOf": [
                {"type": "integer", "minimum": 0, "maximum": most::<T>()},
                {"type": "string", "pattern": HEXADECIMAL},
            ],
        })
    }
}

impl<T> PartialSchema for Bits<T> {
    fn schema() -> RefOr<Schema> {
        let number = ObjectBuilder::new()
            .schema_type(Type::Integer)
            .minimum(Some(0))
            .maximum(Some(most::<T>()));
        let text = ObjectBuilder::new()
            .schema_type(Type::String)
            .pattern(Some(HEXADECIMAL));
        let either = OneOfBuilder::new().item(number).item(text);
        either.description(Some(DESCRIPTION)).into()
    }
}

impl<T> ToSchema for Bits<T> {
    fn name() -> Cow<'static, str> {
        <Self as JsonSchema>::schema_name()
    }
}

/// The largest number.
fn most<T>() -> u64 {
    u64::MAX >> (64 - 8 * size_of::<T>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(json: &str) -> Result<CpuModel, String> {
        serde_json::from_str(json).map_err(|wrong| wrong.to_string())
    }

    #[test]
    fn a_model_is_a_level_or_a_template() {
        for (name, level) in [
            ("host", CpuLevel::Host),
            ("x86-64-v2", CpuLevel::V2),
            ("x86-64-v3", CpuLevel::V3),
        ] {
            let model = model(&format!("{name:?}")).unwrap();
            assert_eq!(model, CpuModel::Level(level));
        }
        let template = CpuTemplate {
            base: CpuLevel::V3,
            cpuid: vec![CpuidChange {
                leaf: Bits(1),
                subleaf: Bits(0),
                register: CpuidRegister::Ecx,
                clear: Bits(0),
                set: Bits(1 << 25),
            }],
            msr: vec![MsrChange {
                index: Bits(0x10a),
                clear: Bits(1 << 63),
                set: Bits(0),
            }],
        };
        let expected = CpuModel::Template(template);
        for json in [
            r#"{"base": "x86-64-v3", "cpuid": [{"leaf": "0x1", "register": "ecx", "set": "0x0200_0000"}],
                "msr": [{"index": "0x10a", "clear": 9223372036854775808}]}"#,
            &serde_json::to_string(&expected).unwrap(),
        ] {
            assert_eq!(model(json).unwrap(), expected);
        }
        assert_eq!(
            model("{}").unwrap(),
            CpuModel::Template(CpuTemplate::default())
        );
    }

    #[test]
    fn what_is_neither_is_refused_by_what_is_wrong_with_it() {
        for (json, said) in [
            (
                r#""x86-64-v9""#,
                "unknown variant `x86-64-v9`, expected one of `host`",
            ),
            ("3", "expected a level of CPUs, or a template as an object"),
            (
                r#"{"bass": "host"}"#,
                "unknown field `bass`, expected one of `base`",
            ),
            (r#"{"cpuid": [{"leaf": 1}]}"#, "missing field `register`"),
            (
                r#"{"cpuid": [{"leaf": 1, "register": "rcx"}]}"#,
                "unknown variant `rcx`",
            ),
            (
                r#"{"msr": [{"index": 4294967296}]}"#,
                "expected a number of 32 bits",
            ),
            (r#"{"msr": [{"index": "10a"}]}"#, "as in \"0x1f\""),
        ] {
            let wrong = model(json).unwrap_err();
            assert!(wrong.contains(said), "{json}: {wrong}");
        }
    }

    #[test]
    fn a_bit_is_cleared_or_set() {
        let check = |json: &str| serde_json::from_str::<CpuTemplate>(json).unwrap().check();
        let cpuid = r#"{"cpuid": [{"leaf": 7, "register": "ecx", "clear": 3, "set": 6}]}"#;
        let contradiction = InvalidTemplate::Cpuid { leaf: 7, bits: 2 };
        assert_eq!(check(cpuid), Err(contradiction));
        let msr =
            r#"{"msr": [{"index": 1, "clear": 1, "set": 2}, {"index": 2, "clear": 4, "set": 4}]}"#;
        let contradiction = InvalidTemplate::Msr { index: 2, bits: 4 };
        assert_eq!(check(msr), Err(contradiction));
        assert_eq!(check("{}"), Ok(()));
    }

    #[test]
    fn a_template_has_no_more_changes_than_a_cpu_has_leaves() {
        let of = |changes| CpuTemplate {
            msr: vec![serde_json::from_str(r#"{"index": 1}"#).unwrap(); changes],
            ..CpuTemplate::default()
        };
        assert_eq!(of(MAX_CHANGES).check(), Ok(()));
        let refused = of(MAX_CHANGES + 1).check();
        assert_eq!(refused, Err(InvalidTemplate::TooLong(MAX_CHANGES + 1)));
    }
}
