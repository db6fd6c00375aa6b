//! A checksum on every row, over its place and its content, so that damage and misplaced rows are seen and not believed.

use super::disk::Table;
use sha2::{Digest, Sha256};

const CHECKSUM: usize = 8;

/// `payload` and the first bytes of SHA-256 over table, key and payload.
pub fn seal(table: Table, key: &[u8], mut payload: Vec<u8>) -> Vec<u8> {
    let checksum = checksum(table, key, &payload);
    payload.extend_from_slice(&checksum);
    payload
}

/// The payload of a sealed row; `None` when it is damaged.
pub fn open<'a>(table: Table, key: &[u8], sealed: &'a [u8]) -> Option<&'a [u8]> {
    let (payload, found) = sealed.split_at_checked(sealed.len().checked_sub(CHECKSUM)?)?;
    (checksum(table, key, payload) == found).then_some(payload)
}

fn checksum(table: Table, key: &[u8], payload: &[u8]) -> [u8; CHECKSUM] {
    let mut hash = Sha256::new();
    hash.update(table.name());
    hash.update((key.len() as u64).to_le_bytes());
    hash.update(key);
    hash.update(payload);
    let mut short = [0; CHECKSUM];
    short.copy_from_slice(&hash.finalize()[..CHECKSUM]);
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_and_the_place_count() {
        let sealed = seal(Table::Log, b"key", b"payload".to_vec());
        assert_eq!(open(Table::Log, b"key", &sealed), Some(&b"payload"[..]));
        assert_eq!(open(Table::Meta, b"key", &sealed), None);
        assert_eq!(open(Table::Log, b"kez", &sealed), None);
        assert_eq!(open(Table::Log, b"key", &sealed[..3]), None);
        for bit in 0..sealed.len() * 8 {
            let mut damaged = sealed.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(open(Table::Log, b"key", &damaged), None, "bit {bit}");
        }
    }
}
