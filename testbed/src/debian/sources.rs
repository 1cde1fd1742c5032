//! Where packages come from: what this machine's own apt is set up for.

use std::process::Command;

use anyhow::{Context, Result, bail};

/// One line for a sources.list of each archive of `suite` that this machine's apt knows, and one of its backports, which lie
/// beside it.
///
/// # Errors
/// When apt knows none.
pub(super) fn of(suite: &str) -> Result<Vec<String>> {
    // What is between two targets' fields is a tab: no URI has one.
    let format = "$(ORIGIN)\t$(COMPONENT)\t$(CODENAME)\t$(REPO_URI)";
    let targets = output(
        "apt-get",
        &["indextargets", "--format", format, "Created-By: Packages"],
    )?;
    let lines = parse(suite, &targets);
    if lines.is_empty() {
        bail!("apt knows no archive of Debian {suite}: run apt-get update if it is set up for one");
    }
    Ok(lines)
}

fn parse(suite: &str, targets: &str) -> Vec<String> {
    let mut lines = Vec::new();
    for target in targets.lines() {
        let fields: Vec<&str> = target.split('\t').collect();
        let &["Debian", "main", codename, uri] = &fields[..] else {
            continue;
        };
        let mut add = |codename: &str| {
            let line = format!("deb {uri} {codename} main");
            if !lines.contains(&line) {
                lines.push(line);
            }
        };
        if codename == suite {
            add(suite);
            add(&format!("{suite}-backports"));
        } else if codename == format!("{suite}-updates") || codename == format!("{suite}-security")
        {
            add(codename);
        }
    }
    // Without the suite itself nothing can be installed from the others.
    if lines
        .iter()
        .any(|line| line.contains(&format!(" {suite} ")))
    {
        lines
    } else {
        Vec::new()
    }
}

/// mmdebstrap's options for what this machine's apt is told about proxies and about archives of the past.
pub(super) fn apt_options() -> Result<Vec<String>> {
    let dump = output(
        "apt-config",
        &["dump", "--format", "%F \"%v\"%n", "Acquire"],
    )?;
    let wanted = |line: &&str| {
        ["Acquire::http", "Acquire::Check-"]
            .iter()
            .any(|start| line.starts_with(start))
    };
    // What has no value of its own is only the name of a group.
    let lines = dump
        .lines()
        .filter(wanted)
        .filter(|line| !line.ends_with("\"\""));
    Ok(lines.map(|line| format!("--aptopt={line}")).collect())
}

fn output(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{program} {} failed: {said}", arguments.join(" "));
    }
    String::from_utf8(output.stdout).with_context(|| format!("{program} prints no UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGETS: &str = "\
Debian\tmain\tbookworm\tmirror:/a/
Debian\tcontrib\tbookworm\tmirror:/a/
Debian\tmain\tbookworm\tmirror:/a/
Debian\tmain\tbookworm-security\tmirror:/s/
Somebody\tmain\tbookworm\tmirror:/else/
";

    #[test]
    fn backports_lie_beside_the_suite() {
        assert_eq!(
            parse("bookworm", TARGETS),
            [
                "deb mirror:/a/ bookworm main",
                "deb mirror:/a/ bookworm-backports main",
                "deb mirror:/s/ bookworm-security main",
            ]
        );
    }

    #[test]
    fn updates_alone_make_no_debian() {
        let security = "Debian\tmain\tbookworm-security\tmirror:/s/\n";
        assert!(parse("bookworm", security).is_empty());
        assert!(parse("trixie", TARGETS).is_empty());
    }
}
