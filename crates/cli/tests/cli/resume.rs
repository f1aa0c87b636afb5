//! Training that is interrupted or killed goes on with `--resume` and ends with the same bytes.

use crate::common::Work;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// More steps than can be made in the time it takes to see the first few and send a signal.
const TOKENS: u32 = 64 * 600;

struct Job {
    work: Work,
    line: String,
    metrics: &'static str,
    /// What is compared at the end.
    out: &'static str,
}

fn align_job() -> Job {
    let work = Work::with_model("llama3");
    work.ok("analyze --model llama3 --data data.npy --tokens 256 --context 64 --out heads.json");
    let line = format!(
        "align --model llama3 --heads heads.json --data data.npy --tokens {TOKENS} --context 32 --tokens-per-step 64 \
         --measure-tokens 64 --mixer mamba2 --window 4 --out bank --metrics align.jsonl"
    );
    Job { work, line, metrics: "align.jsonl", out: "bank" }
}

fn heal_job(train: &str) -> Job {
    let work = Work::with_model("llama3");
    work.make_hybrid("llama3", "gated-delta", 4);
    let line = format!(
        "heal --model hybrid --base llama3 --data data.npy --tokens {TOKENS} --context 32 --batch 2 --train {train} --out healed"
    );
    Job { work, line, metrics: "healed.train/metrics.jsonl", out: "healed/model.safetensors" }
}

impl Job {
    fn steps(&self) -> usize {
        std::fs::read_to_string(self.work.path(self.metrics)).map_or(0, |text| text.lines().count())
    }

    /// Starts the job, waits for `steps` new steps, sends the signal, and returns how the process ended and its stderr.
    fn interrupt(&self, more: &str, steps: usize, signal: &str) -> (ExitStatus, String) {
        let enough = self.steps() + steps;
        let mut command = self.work.command(&format!("{} --save-every 0 {more}", self.line));
        let mut child: Child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        while self.steps() < enough && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let id = child.id().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().unwrap().success(), "it had ended already");
        let output = child.wait_with_output().unwrap();
        (output.status, String::from_utf8(output.stderr).unwrap())
    }

    /// The bytes that an uninterrupted run makes; what it wrote is removed.
    fn reference(&self) -> Vec<u8> {
        let before = self.work.listing();
        self.work.ok(&self.line);
        let bytes = self.work.read(self.out);
        for name in self.work.listing().into_keys().filter(|name| !before.contains_key(name)) {
            let path = self.work.path(&name);
            if path.is_dir() {
                std::fs::remove_dir_all(path).unwrap()
            } else {
                let _ = std::fs::remove_file(path);
            }
        }
        bytes
    }

    fn killed_and_interrupted(&self) {
        let reference = self.reference();
        let (status, text) = self.interrupt("", 3, "-KILL");
        assert_eq!(status.code(), None, "{text}");
        assert!(!self.work.path(self.out).exists());
        let (status, text) = self.interrupt("--resume", 5, "-KILL");
        assert_eq!(status.code(), None, "{text}");
        let (status, text) = self.interrupt("--resume", 6, "-INT");
        assert_eq!(status.code(), Some(130), "{text}");
        assert!(text.contains("error: interrupted") && text.contains("--resume"), "{text}");
        let (status, text) = self.interrupt("--resume", 3, "-TERM");
        assert_eq!(status.code(), Some(130), "{text}");
        assert!(!self.work.path(self.out).exists());
        // A kill may lose the step that was being saved, no more.
        assert!(self.steps() >= 3 + 5 + 6 + 3 - 2, "resuming started over");
        self.work.ok(&format!("{} --resume", self.line));
        assert_eq!(self.steps() as u32, TOKENS / 64, "each step is logged once");
        assert!(self.work.read(self.out) == reference, "the resumed run ended with other bytes");
        let left: Vec<_> = self.work.listing().into_keys().filter(|name| name.contains(".tmp-")).collect();
        assert!(left.is_empty(), "left behind by a kill: {left:?}");
    }
}

#[test]
fn align() {
    align_job().killed_and_interrupted();
}

#[test]
fn heal_heads() {
    heal_job("heads").killed_and_interrupted();
}

#[test]
fn heal_low_rank() {
    heal_job("lora:2").killed_and_interrupted();
}

#[test]
fn heal_elastic() {
    heal_job("heads --elastic 0.25,0.5").killed_and_interrupted();
}

#[test]
fn an_extension_that_was_killed_goes_on() {
    let job = align_job();
    let short = job.line.replace(&format!("--tokens {TOKENS}"), "--tokens 128");
    job.work.ok(&short);
    let before = job.work.read("bank");
    let (status, text) = job.interrupt("--extend", 3, "-KILL");
    assert_eq!(status.code(), None, "{text}");
    assert!(job.work.read("bank") == before, "the bank changes when the run is complete");
    let out = job.work.ok(&format!("{} --extend --resume", job.line));
    assert!(out.contains(&format!("after {} tokens", TOKENS + 128)), "{out}");
    assert_eq!(job.steps() as u32, TOKENS / 64);
    assert!(job.work.listing().into_keys().all(|name| !name.contains(".tmp-")));
}

#[test]
fn other_settings_are_refused() {
    let job = align_job();
    let (status, text) = job.interrupt("", 2, "-INT");
    assert_eq!(status.code(), Some(130), "{text}");
    let other = job.line.replace("--context 32", "--context 64");
    job.work.fails(1, &format!("{other} --resume"), &["hint:", "--resume"]);
    // The starting values follow from the seed.
    job.work.fails(1, &format!("{} --seed 1 --resume", job.line), &["hint:", "--resume"]);

    let job = heal_job("heads");
    let (status, text) = job.interrupt("", 2, "-INT");
    assert_eq!(status.code(), Some(130), "{text}");
    job.work.fails(1, &format!("{} --stage continue --resume", job.line), &["hint:", "--resume"]);
}

#[test]
fn a_damaged_state_is_refused() {
    let job = align_job();
    let (status, text) = job.interrupt("", 2, "-INT");
    assert_eq!(status.code(), Some(130), "{text}");
    let state = job.work.read("bank.state");
    job.work.write("bank.state", &state[..state.len() / 2]);
    job.work.fails(1, &format!("{} --resume", job.line), &["bank.state"]);
}

#[test]
fn what_cannot_be_resumed_just_stops() {
    let work = Work::with_model("llama3");
    let mut command = work.command("bench --model llama3 --depths 100000 --beyond-context --threads 1");
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    // A process that has not come to its handler yet is ended by the signal itself.
    assert!(matches!(output.status.code(), None | Some(130)), "{output:?}");
    assert!(output.stdout.is_empty());
}
