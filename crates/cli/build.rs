//! Tells the program the commit it is built from, as `RECURFORMER_COMMIT`; nothing where there is no git or no repository.

use std::process::Command;

fn git(args: &[&str]) -> Option<String> {
    let output = Command::new("git").args(args).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_string())
}

fn main() {
    // Any change of the sources can make the tree dirty or clean; the log of HEAD grows with every commit and checkout.
    println!("cargo:rerun-if-changed=..");
    let Some(commit) = git(&["describe", "--always", "--dirty", "--abbrev=12", "--match=v*"]) else { return };
    println!("cargo:rustc-env=RECURFORMER_COMMIT={commit}");
    if let Some(log) = git(&["rev-parse", "--git-path", "logs/HEAD"])
        && std::path::Path::new(&log).exists()
    {
        println!("cargo:rerun-if-changed={log}");
    }
}
