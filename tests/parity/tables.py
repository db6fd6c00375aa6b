"""Makes small Parquet files with pyarrow, for worker/data/tests/sources.rs, and what is in them. See README.md.

    python tables.py         writes golden/parquet of worker/data anew

Needs pyarrow (26).
"""

import json
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq

OUT = pathlib.Path(__file__).parent.parent.parent / "worker" / "data" / "tests" / "golden" / "parquet"
WORDS = ["ship", "harbour", "caf\u00e9", "storm", "\U0001f600", "rope", "island", "gull"]
TEXTS = [" ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % 8] for j in range(5 + i % 9)) + f" {i}." for i in range(60)]
TURN = pa.struct([("role", pa.string()), ("content", pa.string())])


def rows():
    for i in range(24):
        asked = {"role": "user", "content": f"What is {i} + {i}?"}
        yield {
            "messages": [asked, {"role": "assistant", "content": f"{2 * i}."}],
            "prompt": [asked],
            "chosen": [{"role": "assistant", "content": f"{2 * i}."}],
            "rejected": [{"role": "assistant", "content": f"{2 * i + 1}, caf\u00e9"}],
            "tags": ["a", "b"][: i % 3],
            "score": i / 4,
            "good": i % 2 == 0,
            "count": i,
            "meta": {"source": "made", "deep": {"n": i}} if i % 4 else None,
        }


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    ids = pa.array(range(60), pa.int64())
    images = pa.array([{"bytes": b"\x89PNG\x00" * 3, "path": "a.png"}] * 60, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = lambda kind: pa.table({"id": ids, "text": pa.array(TEXTS, kind), "image": images})
    pq.write_table(table(pa.string()), OUT / "snappy.parquet", compression="snappy", row_group_size=25)
    pq.write_table(table(pa.large_string()), OUT / "zstd.parquet", compression="zstd", data_page_version="2.0", use_dictionary=False)
    pq.write_table(table(pa.string()), OUT / "gzip.parquet", compression="gzip", version="1.0")
    pq.write_table(table(pa.string()), OUT / "plain.parquet", compression="none", row_group_size=7)
    with_null = pa.table({"text": pa.array(["a", None, "c"], pa.string()), "data": pa.array([b"a", b"b", b"c"], pa.binary())})
    pq.write_table(with_null, OUT / "null.parquet")
    turns = pa.list_(TURN)
    schema = pa.schema([("messages", turns), ("prompt", turns), ("chosen", turns), ("rejected", turns), ("tags", pa.list_(pa.string())),
                        ("score", pa.float64()), ("good", pa.bool_()), ("count", pa.int32()),
                        ("meta", pa.struct([("source", pa.string()), ("deep", pa.struct([("n", pa.int64())]))]))])
    all_rows = list(rows())
    pq.write_table(pa.Table.from_pylist(all_rows, schema), OUT / "rows.parquet", compression="zstd", row_group_size=10)
    (OUT / "expected.json").write_text(json.dumps({"pyarrow": pa.__version__, "texts": TEXTS, "rows": all_rows}, indent=1) + "\n")


main()
