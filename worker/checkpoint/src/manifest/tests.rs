use super::*;
use proptest::prelude::*;

const NEW: &str = r#"{"format":"fleet-checkpoint/3","step":100,"serial":2,"loss":1.5,"run":"c/job-1","strategy":"fsdp",
    "world_size":2,"disks":["box-1","box-2"],
    "files":{"a.safetensors":{"bytes":40,"sha256":"ab","writer":0},"b.safetensors":{"bytes":40,"sha256":"cd","writer":1,"disk":1}},
    "tensors":{"w":{"dtype":"F32","shape":[3,2],"pieces":[{"file":"a.safetensors","offset":24,"bytes":16,"sha256":"ef"},
    {"file":"b.safetensors","offset":32,"bytes":8,"sha256":"01"}]}}}"#;

proptest! {
    #[test]
    fn arbitrary_bytes_are_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(Manifest::parse(&bytes).is_err());
    }

    #[test]
    fn a_manifest_with_a_changed_byte_never_panics(at in 0usize..600, byte: u8) {
        let mut bytes = NEW.as_bytes().to_vec();
        let at = at % bytes.len();
        bytes[at] = byte;
        let _ = Manifest::parse(&bytes);
    }
}

/// As checkpoints on users' disks have it: a change that does not read this needs a new `FORMAT` and a reader of the old one.
#[test]
fn the_layout_on_disk_never_changes() {
    let manifest = Manifest::parse(NEW.as_bytes()).unwrap();
    let written: serde_json::Value = serde_json::to_value(&manifest).unwrap();
    assert_eq!(written, serde_json::from_str::<serde_json::Value>(NEW).unwrap());
}

#[test]
fn what_earlier_versions_wrote_is_read() {
    let text = r#"{"format":"fleet-checkpoint/1","step":100,"serial":2,"loss":null,"run":"c/job-1",
        "files":{"config.json":{"bytes":12,"sha256":"ab"}}}"#;
    let manifest = Manifest::parse(text.as_bytes()).unwrap();
    assert_eq!((manifest.step, manifest.serial, manifest.loss, manifest.bytes()), (100, 2, None, 12));
    let early = text.replace(r#","run":"c/job-1""#, "");
    assert_eq!(
        Manifest { run: String::new(), ..manifest.clone() },
        Manifest::parse(early.as_bytes()).unwrap()
    );
    let two = NEW.replace("point/3", "point/2").replace(r#""disks":["box-1","box-2"],"#, "");
    let manifest = Manifest::parse(two.replace(r#","disk":1"#, "").as_bytes()).unwrap();
    assert_eq!((manifest.world_size, manifest.disks.len(), manifest.tensors.len()), (2, 0, 1));
}

#[test]
fn what_lies_on_other_disks_is_told_from_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let manifest = Manifest::parse(NEW.as_bytes()).unwrap();
    assert!(!manifest.fits(dir.path()) && manifest.elsewhere(dir.path()).is_empty());
    let write = |name: &str, bytes: usize| std::fs::write(dir.path().join(name), vec![0; bytes]).unwrap();
    write("b.safetensors", 40);
    assert!(manifest.fits(dir.path()));
    assert_eq!(manifest.elsewhere(dir.path()), BTreeSet::from(["a.safetensors"]));
    write("a.safetensors", 39);
    assert!(manifest.fits(dir.path()) && manifest.elsewhere(dir.path()).is_empty());
    assert_eq!(manifest.missing(dir.path()), BTreeSet::from(["a.safetensors"]));
    assert_eq!(manifest.named("b.safetensors"), "b.safetensors, which rank 1 wrote on box-2,");
}

#[test]
fn names_that_leave_the_directory_are_refused() {
    for name in ["../x", "a/b", "..", "", "/etc/passwd"] {
        let text = format!(
            r#"{{"format":"{FORMAT}","step":1,"serial":1,"loss":null,"files":{{"{name}":{{"bytes":1,"sha256":""}}}}}}"#
        );
        let flaw = Manifest::parse(text.as_bytes()).unwrap_err();
        assert!(matches!(&flaw, Flaw::Damage(what) if what.contains("names a file")), "{name}: {flaw:?}");
    }
}

#[test]
fn tensors_that_are_not_whole_and_pieces_that_cannot_be_are_refused() {
    let cases = [
        (r#""bytes":8"#, r#""bytes":4"#, "not all of the tensor w"),
        (r#"[3,2]"#, r#"[3,18446744073709551615]"#, "not all of the tensor w"),
        (r#""offset":32"#, r#""offset":33"#, "a piece of w where there is none"),
        (r#""offset":32"#, r#""offset":18446744073709551615"#, "a piece of w where there is none"),
        (r#"{"file":"b.s"#, r#"{"file":"c.s"#, "pieces in `c.safetensors`, which it does not name"),
        (r#"{"file":"b.s"#, r#"{"file":"a.s"#, "a piece of w where there is none"),
        (r#""disk":1"#, r#""disk":2"#, "`b.safetensors` on a disk that it does not name"),
    ];
    for (is, instead, said) in cases {
        let flaw = Manifest::parse(NEW.replacen(is, instead, 1).as_bytes()).unwrap_err();
        assert!(matches!(&flaw, Flaw::Damage(what) if what.contains(said)), "{said}: {flaw:?}");
    }
}
