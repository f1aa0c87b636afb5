//! A folder to work in, ways to run the command there, and tiny models and data to give it.

use npyz::WriterBuilder;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use weights::TensorSource;
use weights::safetensors::SafetensorsSource;

/// Vocabulary of the tiny models.
pub const VOCAB: u32 = 64;

/// A working folder; the command runs in it, with caches of its own and no network.
pub struct Work {
    dir: tempfile::TempDir,
}

impl Work {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    /// A folder with the tiny model `family` (without a tokenizer) and token ids to train and evaluate on in `data.npy`.
    pub fn with_model(family: &str) -> Self {
        let work = Self::new();
        work.model(family, family);
        work.write("data.npy", &npy(&random_tokens(3000, 1)));
        work
    }

    /// The same with a tokenizer.
    pub fn with_text_model(family: &str) -> Self {
        let work = Self::with_model(family);
        work.add_tokenizer(family);
        work
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap();
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    pub fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&self.read(name)).unwrap()
    }

    /// Copies the tiny model `family` to the folder `name`.
    pub fn model(&self, family: &str, name: &str) {
        let to = self.path(name);
        fs::create_dir(&to).unwrap();
        for entry in fs::read_dir(golden_dir(family)).unwrap() {
            let from = entry.unwrap().path();
            let file = from.file_name().unwrap().to_str().unwrap().to_string();
            if file == "config.json" || file.starts_with("model") {
                fs::copy(&from, to.join(file)).unwrap();
            }
        }
    }

    /// Gives the model in the folder `name` a tokenizer of single characters and a few pairs, and a chat template.
    pub fn add_tokenizer(&self, name: &str) {
        self.write(&format!("{name}/tokenizer.json"), &tokenizer_json());
        let config = json!({
            "bos_token": "<s>", "eos_token": "</s>",
            "chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
        });
        self.write(&format!("{name}/tokenizer_config.json"), config.to_string().as_bytes());
    }

    /// The command with the arguments in `line`, separated by white space.
    pub fn command(&self, line: &str) -> Command {
        self.command_with(&line.split_whitespace().collect::<Vec<_>>())
    }

    pub fn command_with(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_recurformer"));
        command
            .args(args)
            .current_dir(self.dir.path())
            .env_remove("RECURFORMER_ISA")
            .env("RECURFORMER_CACHE", self.path(".cache"))
            .env("HF_HOME", self.path(".hub"))
            .env("HF_HUB_OFFLINE", "1")
            .env_remove("HF_HUB_CACHE")
            .stdin(Stdio::null());
        command
    }

    /// Runs it, demands success, and returns stdout.
    pub fn ok(&self, line: &str) -> String {
        succeed(self.command(line).output().unwrap(), line).stdout
    }

    /// Runs it and parses stdout.
    pub fn ok_json(&self, line: &str) -> Value {
        serde_json::from_str(&self.ok(line)).unwrap_or_else(|e| panic!("{line}: {e}"))
    }

    /// Runs it and demands a failure: this exit code, one `error:` that says all of `needles` (with one `hint:` unless it is about usage), nothing on stdout, no panic, and no file
    /// made, changed or removed.
    pub fn fails(&self, code: i32, line: &str, needles: &[&str]) -> String {
        self.fails_as(&mut self.command(line), code, needles)
    }

    /// [`fails`](Self::fails) for a command of any kind.
    pub fn fails_as(&self, command: &mut Command, code: i32, needles: &[&str]) -> String {
        let before = self.listing();
        let run = Run::from(command.output().unwrap());
        let what = format!("{command:?}\n{run:?}");
        assert_eq!(run.code, Some(code), "{what}");
        assert!(run.stdout.is_empty(), "{what}");
        assert_eq!(run.stderr.matches("error: ").count(), 1, "{what}");
        assert!(!run.stderr.contains("panicked"), "{what}");
        if code == 1 {
            assert_eq!(run.stderr.matches("hint: ").count(), 1, "{what}");
        }
        for needle in needles {
            assert!(run.stderr.contains(needle), "`{needle}` is not in\n{what}");
        }
        let after = self.listing();
        for (path, content) in &before {
            assert!(after.get(path) == Some(content), "{path} changed\n{what}");
        }
        let new: Vec<_> = after.keys().filter(|path| !before.contains_key(*path)).collect();
        assert!(new.is_empty(), "left behind: {new:?}\n{what}");
        run.stderr
    }

    /// Every file below the folder with its content, caches left out.
    pub fn listing(&self) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        let mut folders = vec![self.dir.path().to_path_buf()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                let name = path.strip_prefix(self.dir.path()).unwrap().display().to_string();
                if name == ".cache" || name == ".hub" {
                    continue;
                }
                if path.is_dir() {
                    files.insert(format!("{name}/"), Vec::new());
                    folders.push(path);
                } else {
                    files.insert(name, fs::read(&path).unwrap());
                }
            }
        }
        files
    }

    /// Analyses `model` and trains a bank for it: `heads.json`, `bank.safetensors`.
    pub fn make_bank(&self, model: &str, mixer: &str, window: usize) {
        self.ok(&format!(
            "analyze --model {model} --data data.npy --tokens 256 --context 64 --out heads.json"
        ));
        self.ok(&format!(
            "align --model {model} --heads heads.json --data data.npy --tokens 256 --context 32 --tokens-per-step 64 \
             --measure-tokens 256 --mixer {mixer} --window {window} --out bank.safetensors"
        ));
    }

    /// [`make_bank`](Self::make_bank), then `plan.json` for half of the groups and the folder `hybrid`.
    pub fn make_hybrid(&self, model: &str, mixer: &str, window: usize) {
        self.make_bank(model, mixer, window);
        self.ok("plan --heads heads.json --bank bank.safetensors --beta 0.5 --out plan.json");
        self.ok(&format!("convert --model {model} --plan plan.json --bank bank.safetensors --out hybrid"));
    }
}

/// What a finished command left.
#[derive(Debug)]
pub struct Run {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl From<Output> for Run {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

/// Demands exit code 0.
pub fn succeed(output: Output, what: &str) -> Run {
    let run = Run::from(output);
    assert_eq!(run.code, Some(0), "{what}\n{}", run.stderr);
    run
}

/// Folder of a tiny model with its golden results.
pub fn golden_dir(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/data").join(family)
}

/// Token ids that a fixed generator draws.
pub fn random_tokens(count: usize, seed: u64) -> Vec<i32> {
    let mut state = seed;
    let mut next = move || {
        // Knuth's MMIX generator; the high bits are good enough for data.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % u64::from(VOCAB)) as i32
    };
    (0..count).map(|_| next()).collect()
}

/// A `.npy` file of a vector.
pub fn npy(ids: &[i32]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = npyz::WriteOptions::new()
        .default_dtype()
        .shape(&[ids.len() as u64])
        .writer(&mut bytes)
        .begin_nd()
        .unwrap();
    writer.extend(ids.iter().copied()).unwrap();
    writer.finish().unwrap();
    bytes
}

/// A file of logits: rows of [`VOCAB`] values.
pub fn read_logits(path: &Path) -> Vec<Vec<f32>> {
    let file = npyz::NpyFile::new(fs::File::open(path).unwrap()).unwrap();
    assert_eq!(file.shape()[1], u64::from(VOCAB));
    let rows = file.shape()[0] as usize;
    let values: Vec<f32> = file.into_vec().unwrap();
    assert_eq!(values.len(), rows * VOCAB as usize);
    values.chunks(VOCAB as usize).map(<[f32]>::to_vec).collect()
}

/// Standard deviation of all values.
pub fn std_dev(rows: &[Vec<f32>]) -> f64 {
    let values: Vec<f64> = rows.iter().flatten().map(|&x| f64::from(x)).collect();
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    (values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / values.len() as f64).sqrt()
}

/// Largest difference of two equally shaped tables.
pub fn largest_difference(a: &[Vec<f32>], b: &[Vec<f32>]) -> f64 {
    assert_eq!(a.iter().map(Vec::len).collect::<Vec<_>>(), b.iter().map(Vec::len).collect::<Vec<_>>());
    a.iter().flatten().zip(b.iter().flatten()).map(|(x, y)| f64::from((x - y).abs())).fold(0.0, f64::max)
}

/// Name → (dtype, shape, bytes) of every tensor of a model folder.
pub fn tensors(dir: &Path) -> BTreeMap<String, (String, Vec<usize>, Vec<u8>)> {
    let source = SafetensorsSource::open_dir(dir).unwrap();
    let read = |info: &weights::TensorInfo| {
        let (dtype, bytes) = source.raw(&info.name).unwrap().unwrap();
        (info.name.clone(), (format!("{dtype:?}"), info.shape.clone(), bytes.to_vec()))
    };
    source.infos().iter().map(read).collect()
}

/// Lower-case letters, digits, some marks and common pairs: 64 entries with the three special tokens.
fn tokenizer_json() -> Vec<u8> {
    let pairs = ["th", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "ou", "is", "it", "or", "to"];
    let specials = ["<unk>", "<s>", "</s>"];
    let single = "abcdefghijklmnopqrstuvwxyz0123456789 \n.,'?-!:;".chars().map(String::from);
    let entries = specials.iter().map(ToString::to_string).chain(single).chain(pairs.map(String::from));
    let vocab: serde_json::Map<String, Value> =
        entries.zip(0..).map(|(text, id): (_, u32)| (text, id.into())).collect();
    assert_eq!(vocab.len(), VOCAB as usize);
    let added: Vec<Value> = specials
        .iter()
        .zip(0..)
        .map(|(text, id)| {
            json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    let merges: Vec<String> = pairs.iter().map(|p| format!("{} {}", &p[..1], &p[1..])).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": {"type": "Lowercase"}, "pre_tokenizer": null, "post_processor": null, "decoder": {"type": "Fuse"},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": merges
        }
    })
    .to_string()
    .into_bytes()
}

/// A result without what tells when and by which command it was made.
pub fn without_run(mut result: Value) -> Value {
    assert!(result.as_object_mut().unwrap().remove("run").is_some(), "no `run` in {result}");
    result
}

/// Sentences for the text paths.
pub fn some_text(sentences: usize) -> String {
    let subjects = ["the whale", "a sailor", "the old captain", "one bird", "the tide"];
    let verbs = ["saw", "followed", "forgot", "heard", "turned to"];
    let objects = ["the harbour", "a distant light", "its own shadow", "the storm", "another ship"];
    (0..sentences)
        .map(|i| {
            format!("{} {} {}.\n", subjects[i % 5], verbs[(i / 5 + i) % 5], objects[(i / 25 + 2 * i) % 5])
        })
        .collect()
}
