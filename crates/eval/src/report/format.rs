//! Numbers and text as people and other languages read them.

/// Bytes with a binary unit.
pub fn bytes(n: usize) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// A positive number with about four significant digits.
pub fn number(x: f64) -> String {
    if !x.is_finite() {
        return x.to_string();
    }
    match x.abs() {
        a if a >= 1e6 => format!("{x:.2e}"),
        a if a >= 1000.0 => format!("{x:.0}"),
        a if a >= 100.0 => format!("{x:.1}"),
        a if a >= 10.0 => format!("{x:.2}"),
        _ => format!("{x:.3}"),
    }
}

/// A count with commas between thousands.
pub(super) fn count(n: usize) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A value and its interval, if it has one.
pub(crate) fn between(value: f64, interval: Option<(f64, f64)>, format: impl Fn(f64) -> String) -> String {
    match interval {
        Some((low, high)) => format!("{} ({}–{})", format(value), format(low), format(high)),
        None => format(value),
    }
}

/// Text for an HTML element or attribute.
pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Text for a cell or heading of GitHub-flavoured Markdown: one line, without markup, HTML and control characters.
pub(super) fn markdown(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let word = |c: Option<&char>| c.is_some_and(|c| c.is_alphanumeric());
    let mut out = String::with_capacity(text.len());
    for (i, &c) in chars.iter().enumerate() {
        match c {
            _ if c.is_control() => out.push(' '),
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            // Between letters it is no emphasis.
            '_' if i > 0 && word(chars.get(i - 1)) && word(chars.get(i + 1)) => out.push(c),
            '\\' | '`' | '*' | '_' | '[' | ']' | '|' | '~' => out.extend(['\\', c]),
            // Only a web address makes a link without brackets.
            ':' if chars[i + 1..].starts_with(&['/', '/']) => out.push_str("&#58;"),
            '@' => out.push_str("&#64;"),
            _ => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(number(24.591), "24.59");
        assert_eq!(number(f64::INFINITY), "inf");
        assert_eq!(
            [0, 999, 1000, 81_920, 1_234_567].map(count),
            ["0", "999", "1,000", "81,920", "1,234,567"]
        );
    }

    #[test]
    fn markdown_text_is_only_text() {
        assert_eq!(markdown("smollm2_135m"), "smollm2_135m");
        assert_eq!(markdown("a|b\nc _d_ `e`"), "a\\|b c \\_d\\_ \\`e\\`");
        assert_eq!(markdown("<img src=x>"), "&lt;img src=x&gt;");
        assert_eq!(markdown("![x](http://y)"), "!\\[x\\](http&#58;//y)");
        assert_eq!(markdown("\u{1b}[31mred"), " \\[31mred");
    }
}
