//! What others have written is under licences and from places that `deny.toml` allows.
//!
//! That is cargo-deny's file and, of its checks, those that need no network: its own program takes as long to build as the
//! rest of CI. Who has it can run `cargo deny check`, which agrees.

#![allow(clippy::unwrap_used)] // a test that cannot go on should stop

use std::{collections::BTreeSet, path::Path, process::Command};

use serde_json::Value;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// The packages that are built for the target that `deny.toml` names.
fn packages(deny: &toml::Table) -> Vec<Value> {
    let target = deny["graph"]["targets"][0].as_str().unwrap();
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--locked", "--offline"])
        .args(["--filter-platform", target])
        .current_dir(root())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    metadata["packages"].as_array().unwrap().clone()
}

fn deny() -> toml::Table {
    let text = std::fs::read_to_string(root().join("deny.toml")).unwrap();
    text.parse().unwrap()
}

fn allowed(deny: &toml::Table) -> BTreeSet<String> {
    let list = deny["licenses"]["allow"].as_array().unwrap();
    let names = list.iter().map(|name| name.as_str().unwrap().to_owned());
    names.collect()
}

#[test]
fn every_licence_is_allowed() {
    let deny = deny();
    let allowed = allowed(&deny);
    for package in packages(&deny) {
        let name = package["name"].as_str().unwrap();
        let licence = package["license"].as_str();
        let licence = licence.unwrap_or_else(|| panic!("{name} does not say its licence"));
        assert!(
            permits(licence, &allowed),
            "{name} is under {licence}, which deny.toml does not allow"
        );
    }
}

#[test]
fn everything_is_ours_or_from_the_registry() {
    let deny = deny();
    for kind in ["unknown-registry", "unknown-git"] {
        assert_eq!(deny["sources"][kind].as_str(), Some("deny"));
    }
    for package in packages(&deny) {
        let name = &package["name"];
        match package["source"].as_str() {
            Some(source) => assert_eq!(
                source, "registry+https://github.com/rust-lang/crates.io-index",
                "{name}"
            ),
            None => {
                let manifest = package["manifest_path"].as_str().unwrap();
                assert!(Path::new(manifest).starts_with(root()), "{name}");
            }
        }
    }
}

/// A version is named of everything that is not a path, lest any will do.
#[test]
fn no_version_is_a_wildcard() {
    let deny = deny();
    assert_eq!(deny["bans"]["wildcards"].as_str(), Some("deny"));
    let ours = packages(&deny).into_iter();
    for package in ours.filter(|package| package["source"].is_null()) {
        for dependency in package["dependencies"].as_array().unwrap() {
            let wild = dependency["req"] == "*" && dependency["path"].is_null();
            let (package, name) = (&package["name"], &dependency["name"]);
            assert!(!wild, "{package} takes any version of {name}");
        }
    }
}

/// Whether an SPDX expression (SPDX 2.3, annex D) can be satisfied with `allowed`. A slash is an `OR` of old manifests.
fn permits(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let spaced = expression
        .replace('(', " ( ")
        .replace(')', " ) ")
        .replace('/', " OR ");
    let mut words = spaced.split_whitespace().peekable();
    let permitted = any_of(&mut words, allowed);
    assert_eq!(words.next(), None, "{expression}");
    permitted
}

type Words<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

/// `OR` binds less than `AND`, and that less than `WITH`.
fn any_of(words: &mut Words<'_>, allowed: &BTreeSet<String>) -> bool {
    let mut permitted = all_of(words, allowed);
    while words.next_if_eq(&"OR").is_some() {
        permitted |= all_of(words, allowed);
    }
    permitted
}

fn all_of(words: &mut Words<'_>, allowed: &BTreeSet<String>) -> bool {
    let mut permitted = one(words, allowed);
    while words.next_if_eq(&"AND").is_some() {
        permitted &= one(words, allowed);
    }
    permitted
}

fn one(words: &mut Words<'_>, allowed: &BTreeSet<String>) -> bool {
    let word = words.next().unwrap();
    if word == "(" {
        let permitted = any_of(words, allowed);
        assert_eq!(words.next(), Some(")"));
        return permitted;
    }
    let mut name = word.to_owned();
    if words.next_if_eq(&"WITH").is_some() {
        name = format!("{word} WITH {}", words.next().unwrap());
    }
    allowed.contains(&name)
}

#[test]
fn expressions_are_read_as_they_are_meant() {
    let allowed = ["MIT", "ISC", "Apache-2.0 WITH LLVM-exception"];
    let allowed = allowed.map(str::to_owned).into();
    for (expression, permitted) in [
        ("MIT", true),
        ("GPL-3.0-only", false),
        ("GPL-3.0-only OR MIT", true),
        ("GPL-3.0-only/MIT", true),
        ("GPL-3.0-only AND MIT", false),
        ("MIT AND ISC", true),
        ("(GPL-3.0-only OR MIT) AND ISC", true),
        ("MIT AND GPL-3.0-only OR ISC", true),
        ("MIT AND (GPL-3.0-only OR Zlib)", false),
        ("Apache-2.0 WITH LLVM-exception", true),
        ("Apache-2.0", false),
    ] {
        assert_eq!(permits(expression, &allowed), permitted, "{expression}");
    }
}
