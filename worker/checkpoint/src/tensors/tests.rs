use super::*;
use proptest::prelude::*;

proptest! {
    #[test]
    fn arbitrary_files_never_panic(
        length in prop_oneof![0u64..400, any::<u64>()], json in "[{}\\[\\]\":,a-z0-9F_ ]{0,200}", data in 0usize..50
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let bytes = [&length.to_le_bytes()[..], json.as_bytes(), &vec![0; data]].concat();
        std::fs::write(&path, bytes).unwrap();
        let _ = Tensors::open(&path);
    }

    #[test]
    fn arbitrary_indexes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = shard_names(&bytes);
    }

    #[test]
    fn headers_with_other_numbers_never_panic(
        shape in proptest::collection::vec(any::<u64>(), 0..4), begin: u64, end: u64, dtype in "F32|BF16|F4|I64|X"
    ) {
        let header = format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{begin},{end}]}}}}"#);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 8]].concat();
        std::fs::write(&path, bytes).unwrap();
        if let Ok(tensors) = Tensors::open(&path) {
            tensors.get("w").unwrap();
        }
    }
}

#[test]
fn an_index_names_files_beside_it_only() {
    assert_eq!(
        shard_names(br#"{"weight_map":{"b":"2.st","a":"1.st","c":"2.st"}}"#).unwrap().0,
        ["1.st", "2.st"]
    );
    assert!(shard_names(br#"{"weight_map":{"b":"../2.st"}}"#).unwrap_err().contains("outside its directory"));
    assert!(shard_names(br#"{"weight_map":{}}"#).is_err());
}
