//! Words, names, values and filler.

use crate::draw::one_of;
use rand::Rng;
use std::collections::HashSet;

const ADJECTIVES: [&str; 40] = [
    "amber",
    "ancient",
    "bitter",
    "bright",
    "broken",
    "calm",
    "clever",
    "copper",
    "crooked",
    "dusty",
    "eager",
    "early",
    "faded",
    "gentle",
    "golden",
    "hollow",
    "humble",
    "iron",
    "lonely",
    "loud",
    "misty",
    "narrow",
    "nimble",
    "northern",
    "pale",
    "patient",
    "proud",
    "quiet",
    "rapid",
    "restless",
    "rusty",
    "scarlet",
    "secret",
    "silver",
    "slow",
    "sturdy",
    "tall",
    "tidy",
    "velvet",
    "wandering",
];

const NOUNS: [&str; 48] = [
    "anchor", "archive", "badger", "barrel", "basket", "bridge", "candle", "canyon", "cellar", "clock",
    "cottage", "engine", "falcon", "ferry", "garden", "gate", "hammer", "harbour", "island", "journal",
    "kettle", "ladder", "lantern", "library", "mailbox", "market", "meadow", "mirror", "museum", "needle",
    "orchard", "otter", "parcel", "pillar", "quarry", "raven", "river", "saddle", "station", "tailor",
    "temple", "thimble", "tower", "valley", "violin", "wagon", "willow", "workshop",
];

const FIRST_NAMES: [&str; 24] = [
    "Ada", "Anton", "Beatrice", "Carlos", "Clara", "Dmitri", "Edith", "Farid", "Greta", "Hugo", "Ingrid",
    "Jonas", "Keiko", "Leon", "Marta", "Nadia", "Oscar", "Priya", "Rosa", "Samuel", "Thea", "Ursula",
    "Viktor", "Yusuf",
];

const LAST_NAMES: [&str; 24] = [
    "Abbott",
    "Bergman",
    "Castillo",
    "Dalton",
    "Ellery",
    "Fontaine",
    "Grant",
    "Hollis",
    "Ivanov",
    "Jensen",
    "Kimura",
    "Lowell",
    "Mercer",
    "Novak",
    "Okafor",
    "Pereira",
    "Quinn",
    "Rossi",
    "Sandoval",
    "Tanaka",
    "Ulrich",
    "Vance",
    "Whitfield",
    "Zeller",
];

const VERBS: [&str; 24] = [
    "admired",
    "borrowed",
    "carried",
    "described",
    "examined",
    "followed",
    "forgot",
    "found",
    "guarded",
    "heard",
    "ignored",
    "kept",
    "left behind",
    "mended",
    "moved",
    "noticed",
    "painted",
    "passed",
    "remembered",
    "repaired",
    "sold",
    "studied",
    "visited",
    "watched",
];

const WHEN: [&str; 16] = [
    "before the rain began",
    "late in the evening",
    "on the way home",
    "without a word",
    "for the second time",
    "while the others slept",
    "as the bells were ringing",
    "in the first week of spring",
    "to everyone's surprise",
    "as they had agreed",
    "when the letter came",
    "after a long silence",
    "near the end of the war",
    "at the edge of the town",
    "with great care",
    "since nobody else would",
];

/// Lines that are repeated as noise.
pub const NOISE: [&str; 6] = [
    "The river runs on. Leaves fall in autumn. The road is long. Birds sing at dawn.",
    "Bread is baked in the morning. Water boils in the pot. The table is set for six.",
    "Trains arrive and trains depart. People wait on the platform. The clock moves on.",
    "Snow lies on the hills. Smoke rises from the chimney. Nobody is on the street today.",
    "One step follows another. The path goes up. The path goes down. The walk continues.",
    "Waves come in. Waves go out. Sand is warm under the sun. A boat passes far away.",
];

/// A sentence of invented prose, no line break.
pub fn sentence(rng: &mut impl Rng) -> String {
    let subject = match rng.random_range(0..3) {
        0 => format!("{} {}", one_of(rng, &FIRST_NAMES), one_of(rng, &LAST_NAMES)),
        1 => format!("The {} {}", one_of(rng, &ADJECTIVES), one_of(rng, &NOUNS)),
        _ => one_of(rng, &FIRST_NAMES).to_string(),
    };
    // A thing has a place, a person does something.
    if subject.starts_with("The ") {
        let place = one_of(rng, &["stood beside", "lay behind", "could be seen from", "was older than"]);
        format!("{subject} {place} the {} {}.", one_of(rng, &ADJECTIVES), one_of(rng, &NOUNS))
    } else {
        let object = format!("the {} {}", one_of(rng, &ADJECTIVES), one_of(rng, &NOUNS));
        format!("{subject} {} {object} {}.", one_of(rng, &VERBS), one_of(rng, &WHEN))
    }
}

/// What a name or value looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// 4 to 8 digits.
    Digits,
    /// One to three nouns.
    Words,
    /// A random UUID (version 4).
    Uuid,
    /// Letters and digits: `QX-4821`.
    Code,
    /// `amber-falcon`.
    Pair,
    /// First and last name.
    Person,
}

impl Style {
    /// What keys look like.
    pub const OF_KEYS: [Self; 4] = [Self::Pair, Self::Person, Self::Code, Self::Uuid];
    /// What values look like.
    pub const OF_VALUES: [Self; 4] = [Self::Digits, Self::Words, Self::Uuid, Self::Code];

    /// A name or value drawn.
    pub fn draw(self, rng: &mut impl Rng) -> String {
        match self {
            Self::Digits => {
                let digits = rng.random_range(4..=8_u32);
                rng.random_range(10_u32.pow(digits - 1)..10_u32.pow(digits)).to_string()
            }
            Self::Words => {
                let words: Vec<&str> = (0..rng.random_range(1..=3)).map(|_| one_of(rng, &NOUNS)).collect();
                words.join(" ")
            }
            Self::Uuid => uuid(rng),
            Self::Code => {
                let mut letter = || char::from(b'A' + rng.random_range(0..26));
                let letters: String = [letter(), letter()].into_iter().collect();
                format!("{letters}-{}", rng.random_range(1000..10_000))
            }
            Self::Pair => format!("{}-{}", one_of(rng, &ADJECTIVES), one_of(rng, &NOUNS)),
            Self::Person => format!("{} {}", one_of(rng, &FIRST_NAMES), one_of(rng, &LAST_NAMES)),
        }
    }
}

/// A random UUID, version 4 (RFC 9562, section 5.4).
pub fn uuid(rng: &mut impl Rng) -> String {
    let bits: u128 = (rng.random::<u128>() & !(0xf << 76) & !(0b11 << 62)) | (0x4 << 76) | (0b10 << 62);
    let hex = format!("{bits:032x}");
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// Draws names that do not repeat.
#[derive(Default)]
pub struct Distinct(HashSet<String>);

impl Distinct {
    /// One that was not drawn before: a name that was, gets a number.
    pub fn draw(&mut self, style: Style, rng: &mut impl Rng) -> String {
        let mut name = style.draw(rng);
        if self.0.contains(&name) {
            name = format!("{name}-{}", self.0.len() + 1);
        }
        self.0.insert(name.clone());
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::draw::{Purpose, stream};

    #[test]
    fn uuids_say_version_and_variant() {
        let mut rng = stream(Purpose::Train, 3, 0);
        for _ in 0..100 {
            let id = uuid(&mut rng);
            assert_eq!(id.split('-').map(str::len).collect::<Vec<_>>(), [8, 4, 4, 4, 12]);
            assert!(id.as_bytes()[14] == b'4' && b"89ab".contains(&id.as_bytes()[19]), "{id}");
        }
    }

    #[test]
    fn distinct_names_stay_distinct_beyond_what_there_is() {
        let mut rng = stream(Purpose::Train, 3, 0);
        let mut names = Distinct::default();
        let drawn: HashSet<String> = (0..3000).map(|_| names.draw(Style::Person, &mut rng)).collect();
        assert_eq!(drawn.len(), 3000);
        assert!(drawn.len() > FIRST_NAMES.len() * LAST_NAMES.len());
    }
}
