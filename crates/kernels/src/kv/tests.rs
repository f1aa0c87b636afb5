use super::*;
use crate::testing::{execs, noise};

#[test]
fn sizes_follow_the_layout() {
    let exec = execs().remove(0);
    for kind in KvType::ALL {
        assert_eq!(KvType::parse(kind.name()), Some(kind));
        let mut store = KvStore::new(kind, 2, 24);
        for rows in [1, 254, 1, 1, 300] {
            let x = noise(1, rows * 48);
            store.append(&exec, MatRef::dense(&x, rows, 48), MatRef::dense(&x, rows, 48));
            assert_eq!(store.bytes(), KvStore::bytes_for(kind, 2, 24, store.len()));
        }
    }
    assert_eq!(KvType::parse("f64"), None);
}
