//! The page: template, style and script, and the results inside.

use super::Report;
use super::format::escape;
use crate::error::{EvalError, Result};
use sha2::{Digest, Sha256};

const TEMPLATE: &str = include_str!("page/page.html");
const STYLE: &str = include_str!("page/page.css");
/// The script's parts; each defines functions that later ones use.
const PARTS: [&str; 8] = [
    include_str!("page/dom.js"),
    include_str!("page/chart.js"),
    include_str!("page/lines.js"),
    include_str!("page/quality.js"),
    include_str!("page/tasks.js"),
    include_str!("page/heads.js"),
    include_str!("page/text.js"),
    include_str!("page/main.js"),
];

impl Report {
    /// The page. Its content security policy allows its own script, known by its hash, and nothing from anywhere else.
    ///
    /// # Errors
    /// [`EvalError::Argument`] when a value cannot be written as JSON.
    pub fn to_html(&self) -> Result<String> {
        let json = serde_json::to_string(self).map_err(|e| EvalError::Argument(format!("report: {e}")))?;
        // Inside a script element only `<` can end the element or open a comment.
        let json = json.replace('<', "\\u003c").replace('\u{2028}', "\\u2028").replace('\u{2029}', "\\u2029");
        let script = format!("\"use strict\";\n(() => {{\n{}}})();\n", PARTS.concat());
        let hash = format!("sha256-{}", base64(&Sha256::digest(&script)));
        let title = escape(&self.title);
        let fill =
            [("title", &*title), ("hash", &hash), ("style", STYLE), ("data", &json), ("script", &script)];
        Ok(filled(TEMPLATE, &fill))
    }
}

/// Replaces each `{{name}}` of the template; what is put in is not looked at again.
fn filled(template: &str, values: &[(&str, &str)]) -> String {
    let mut out = String::with_capacity(template.len() + values.iter().map(|v| v.1.len()).sum::<usize>());
    let mut pieces = template.split("{{");
    out.push_str(pieces.next().unwrap_or_default());
    for piece in pieces {
        let (name, rest) = piece.split_once("}}").unwrap_or((piece, ""));
        out.push_str(values.iter().find(|v| v.0 == name).map_or("", |v| v.1));
        out.push_str(rest);
    }
    out
}

/// Base64 with padding (RFC 4648, section 4).
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0_u32, |word, &b| word << 8 | u32::from(b)) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let digit = (word >> (18 - 6 * i)) as usize & 63;
            out.push(if i <= chunk.len() { ALPHABET[digit] as char } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::testing::hostile_report;
    use super::*;

    #[test]
    fn hostile_text_cannot_leave_its_script_element() {
        let page = hostile_report().to_html().unwrap();
        // The page's two elements and the one mention in the policy; nothing of the results opens or closes another.
        assert_eq!(page.matches("<script").count(), 2);
        assert_eq!(page.matches("</script").count(), 2);
        assert!(!page.contains("<img") && !page.contains("<!--"));
        assert!(page.contains("&lt;script&gt;"), "the title is escaped");
    }

    #[test]
    fn values_are_not_templates() {
        let title = "{{script}} {{data}}".to_string();
        let page = Report { title, ..Report::default() }.to_html().unwrap();
        assert!(page.contains("<title>{{script}} {{data}}</title>"));
    }

    #[test]
    fn the_page_needs_no_network() {
        let page = Report::default().to_html().unwrap();
        for marker in ["src=", "@import", "url(", "<link", "fetch(", "XMLHttpRequest", "innerHTML", "eval("] {
            assert!(!page.contains(marker), "{marker}");
        }
        assert!(page.contains("default-src 'none'"));
        assert!(!page.contains("{{"), "an unfilled placeholder is left");
    }

    #[test]
    fn base64_is_that_of_the_rfc() {
        for (plain, coded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }
}
