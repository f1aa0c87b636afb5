//! The Brown corpus as readable text: its files hold `word/tag` pairs, one sentence a line, blank lines between paragraphs.

/// Removes the part-of-speech tags of one file and sets words and punctuation as print does; paragraphs are separated by blank lines.
pub(super) fn plain_text(tagged: &str) -> String {
    let mut out = String::new();
    let mut setter = Setter::default();
    for line in tagged.lines() {
        let mut words = line.split_whitespace().map(word).peekable();
        if words.peek().is_none() {
            setter.end_paragraph(&mut out);
        }
        for word in words {
            setter.push(word);
        }
    }
    setter.end_paragraph(&mut out);
    out
}

/// The word of a `word/tag` pair. The word may hold slashes, the tag does not.
fn word(pair: &str) -> &str {
    match pair.rsplit_once('/') {
        Some((word, _)) if !word.is_empty() => word,
        _ => pair,
    }
}

/// Sets one paragraph.
#[derive(Default)]
struct Setter {
    text: String,
    /// No space before the next word: after an opening quote or bracket.
    glue: bool,
    /// The word before, for the corpus' doubled `? ?` and `! !`.
    previous: String,
}

impl Setter {
    fn push(&mut self, word: &str) {
        let repeated = self.previous == word;
        match word {
            "?" | "!" | ";" | ":" if repeated => {}
            // American print puts these inside the closing quote; the corpus puts them after it.
            "," | "." | "?" | "!" if self.text.ends_with('"') && self.previous == "''" => {
                self.text.pop();
                if !self.text.ends_with(['?', '!', ',', '.']) {
                    self.text.push_str(word);
                }
                self.text.push('"');
            }
            "," | "." | "?" | "!" | ";" | ":" | ")" | "]" => self.text.push_str(word),
            "''" => self.text.push('"'),
            "``" => self.open("\""),
            "(" | "[" => self.open(word),
            _ => {
                self.space();
                self.text.push_str(word);
            }
        }
        self.previous.clear();
        self.previous.push_str(word);
    }

    fn open(&mut self, mark: &str) {
        self.space();
        self.text.push_str(mark);
        self.glue = true;
    }

    fn space(&mut self) {
        if !self.text.is_empty() && !self.glue {
            self.text.push(' ');
        }
        self.glue = false;
    }

    fn end_paragraph(&mut self, out: &mut String) {
        if !self.text.is_empty() {
            if !out.is_empty() {
                out.push_str("\n\n");
            }
            out.push_str(&self.text);
        }
        *self = Self::default();
    }
}
