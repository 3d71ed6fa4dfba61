"""Attribution rows and query rows, read back from Parquet and compared with a naive loop."""

import numpy as np
import pyarrow as pa
import pytest
from support.shards import STORAGE, make_index, make_plan, make_sources, write_embeddings

from attrib.attribute.blocks import PARTIAL_SCHEMA, block_rows, partial_table, plan_blocks, read_partial
from attrib.attribute.merge import wanted_table
from attrib.attribute.rows import RunStamp, attribution_rows, block_queries, read_sources
from attrib.common.errors import MismatchError
from attrib.data.collections import RESERVED_COLUMNS
from attrib.data.manifest import Manifest, Slice
from attrib.data.settings import CollectionSettings
from attrib.generators.identify.files import VERDICT_FIELDS
from attrib.index.index import Index
from attrib.index.search import Candidates
from attrib.shares.settings import SharesSettings
from attrib.shares.shares import soft_shares

STAMP = RunStamp("run", "model", "index")
TOP_K = 3
ATTRIBUTION_SCHEMA = {
    "query_id": ("int64", False),
    "rank": ("int32", False),
    "source_id": ("int64", False),
    "similarity": ("float", False),
    "share": ("double", False),
    "query_key": ("string", False),
    "query_uri": ("string", False),
    "source_key": ("string", False),
    "source_uri": ("string", False),
    "run_id": ("string", False),
    "model_digest": ("string", False),
    "index_digest": ("string", False),
    "source_owner": ("string", True),
}
OUTCOME_SCHEMA = {
    "query_id": ("int64", False),
    "query_key": ("string", False),
    "query_uri": ("string", False),
    "status": ("string", False),
    "stage": ("string", True),
    "reason": ("string", True),
    "num_sources": ("int32", False),
    "shares_truncated": ("bool", False),
    "top_source_id": ("int64", True),
    "top_similarity": ("float", True),
    "top_share": ("double", True),
    "run_id": ("string", False),
    "generator": ("string", True),
    "generator_verdict": ("string", True),
    "generator_score": ("float", True),
    "generator_margin": ("float", True),
    "generator_p_value": ("double", True),
    "generator_reason": ("string", True),
    "query_prompt": ("string", True),
    "query_steps": ("int64", True),
}


def described(schema: pa.Schema) -> dict:
    return {field.name: (str(field.type), field.nullable) for field in schema}


def make_manifest(uri: str, num_rows: list[int], metadata_columns: list[str]) -> Manifest:
    collection = CollectionSettings(name="generated", uri="/generated")
    return Manifest(uri, collection, "d", "o", "r", num_rows, metadata_columns)


@pytest.fixture
def queries(tmp_path) -> pa.Table:
    """block_queries of four images in two partitions; ids 10, 20, 30 and 40, of which 20 failed."""
    ids = np.array([40, 10, 30, 20])
    vectors = np.eye(4, dtype=np.float16)
    partition_of = np.array([0, 0, 1, 1])
    embeddings = write_embeddings(tmp_path, ids, vectors, partition_of, failed=ids == 20)
    manifest = make_manifest(embeddings.manifest_uri, [2, 2], ["prompt", "steps"])
    prompts = {10: "a cat", 20: None, 30: "", 40: "ein Hund"}
    for partition in (0, 1):
        of_partition = ids[partition_of == partition]  # in reading order, not by id
        rows = {
            "id": of_partition,
            "key": [f"{i}.png" for i in of_partition],
            "uri": [f"/generated/{i}.png" for i in of_partition],
            "prompt": pa.array([prompts[i] for i in of_partition.tolist()], pa.string()),
            "steps": pa.nulls(2, pa.int64()),
        }
        STORAGE.write_table(manifest.partition_uri(partition), pa.table(rows))
    return block_queries(embeddings, manifest, [Slice(1, 0, 2), Slice(0, 0, 2)], STORAGE)


@pytest.fixture
def best() -> Candidates:
    """Three sources of query 0 (id 10), one of query 2 (id 30), three similar ones of query 3 (id 40)."""
    query = np.array([0, 0, 0, 2, 3, 3, 3])
    ids = np.array([7, 3, 9, 3, 1, 4, 6])
    score = np.array([0.9, 0.85, 0.1, 0.4, 0.5, 0.5, 0.5], np.float32)
    return Candidates(query, ids, score, score)


def test_rows_equal_a_naive_loop(queries, best, tmp_path):
    settings = SharesSettings()
    attributions, outcomes = attribution_rows(best, queries, make_sources(np.arange(12)), TOP_K, settings, STAMP)
    for name, table in {"attributions": attributions, "outcomes": outcomes}.items():
        STORAGE.write_table(str(tmp_path / name), table)
    attributions, outcomes = (STORAGE.read_table(str(tmp_path / name)) for name in ("attributions", "outcomes"))
    assert described(attributions.schema) == ATTRIBUTION_SCHEMA
    assert described(outcomes.schema) == OUTCOME_SCHEMA

    query_ids = [10, 20, 30, 40]
    shares = {
        0: soft_shares(np.array([[0.9, 0.85, 0.1]], np.float32), settings)[0].tolist(),
        2: [1.0],
        3: [1 / 3] * 3,
    }
    expected = []
    for query in (0, 2, 3):
        rows = np.flatnonzero(best.query == query)
        for rank, (row, share) in enumerate(zip(rows, shares[query]), start=1):
            source = int(best.id[row])
            expected.append(
                {
                    "query_id": query_ids[query],
                    "rank": rank,
                    "source_id": source,
                    "similarity": float(best.score[row]),
                    "share": pytest.approx(share, abs=1e-12),
                    "query_key": f"{query_ids[query]}.png",
                    "query_uri": f"/generated/{query_ids[query]}.png",
                    "source_key": f"{source}.jpg",
                    "source_uri": f"/sources/{source}.jpg",
                    "run_id": "run",
                    "model_digest": "model",
                    "index_digest": "index",
                    "source_owner": None if source % 3 == 0 else f"owner {source % 5}",
                }
            )
    assert attributions.to_pylist() == expected

    def outcome(query_id, status, num_sources, truncated, top, prompt, stage=None, reason=None):
        return {
            "query_id": query_id,
            "query_key": f"{query_id}.png",
            "query_uri": f"/generated/{query_id}.png",
            "status": status,
            "stage": stage,
            "reason": reason,
            "num_sources": num_sources,
            "shares_truncated": truncated,
            "top_source_id": top[0],
            "top_similarity": top[1],
            "top_share": top[2],
            "run_id": "run",
            "generator": None,
            "generator_verdict": None,
            "generator_score": None,
            "generator_margin": None,
            "generator_p_value": None,
            "generator_reason": None,
            "query_prompt": prompt,
            "query_steps": None,
        }

    def value(number):
        return float(np.float32(number))

    assert shares[0][2] == 0  # 0.1 is too far below 0.9
    assert outcomes.to_pylist() == [
        outcome(10, "attributed", 2, False, (7, value(0.9), pytest.approx(shares[0][0])), "a cat"),
        outcome(20, "failed", 0, False, (None, None, None), None, "decode", "cut off"),
        outcome(30, "attributed", 1, False, (3, value(0.4), 1.0), ""),
        outcome(40, "attributed", 3, True, (1, value(0.5), pytest.approx(1 / 3)), "ein Hund"),
    ]


def test_generator_verdicts_are_joined_to_the_query_rows(queries, best):
    rows = [
        {
            "id": 10,
            "key": "",
            "uri": "",
            "verdict": "known",
            "generator": "a",
            "score": 0.5,
            "margin": 0.25,
            "p_value": 0.01,
        },
        {"id": 20, "key": "", "uri": "", "verdict": "unassessable", "reason": "decode: cut off"},
        {"id": 30, "key": "", "uri": "", "verdict": "unknown", "score": 0.25, "p_value": 0.5, "reason": "nearest is a"},
        {"id": 40, "key": "", "uri": "", "verdict": "family", "generator": "b|c", "score": 0.5, "p_value": 0.02},
    ]
    verdicts = pa.Table.from_pylist(rows, schema=pa.schema(VERDICT_FIELDS))
    given = (best, queries, make_sources(np.arange(12)), TOP_K, SharesSettings(), STAMP)
    attributions, outcomes = attribution_rows(*given, verdicts)
    plain = attribution_rows(*given)
    assert attributions.equals(plain[0]) and described(outcomes.schema) == OUTCOME_SCHEMA
    columns = [name for name in OUTCOME_SCHEMA if name.startswith("generator")]
    assert outcomes.drop_columns(columns).equals(plain[1].drop_columns(columns))
    for row, said in zip(outcomes.to_pylist(), verdicts.to_pylist(), strict=True):
        assert [row[name] for name in columns] == [
            said[name] for name in ("generator", "verdict", "score", "margin", "p_value", "reason")
        ]
    with pytest.raises(MismatchError, match="belong to other images than the queries"):
        attribution_rows(*given, verdicts.slice(0, 3))


def test_block_without_embedded_queries(queries, best):
    none = best.at(np.empty(0, np.int64))
    attributions, outcomes = attribution_rows(
        none, queries, make_sources(np.arange(12)), TOP_K, SharesSettings(), STAMP
    )
    assert len(attributions) == 0 and described(attributions.schema) == ATTRIBUTION_SCHEMA
    assert outcomes["status"].to_pylist() == ["failed"] * 4
    assert outcomes["top_source_id"].null_count == 4 and described(outcomes.schema) == OUTCOME_SCHEMA


def test_block_queries_are_sorted_with_status_and_metadata(queries):
    assert queries["id"].to_pylist() == [10, 20, 30, 40]
    assert queries["stage"].to_pylist() == [None, "decode", None, None]
    assert queries["key"].to_pylist() == ["10.png", "20.png", "30.png", "40.png"]
    assert queries["prompt"].to_pylist() == ["a cat", None, "", "ein Hund"]


def test_manifest_of_other_images_is_an_error(tmp_path):
    ids = np.array([1, 2])
    embeddings = write_embeddings(tmp_path, ids, np.eye(2, dtype=np.float16), np.zeros(2, int))
    manifest = make_manifest(embeddings.manifest_uri, [2], [])
    STORAGE.write_table(manifest.partition_uri(0), pa.table({"id": ids + 1, "key": ["a", "b"], "uri": ["a", "b"]}))
    with pytest.raises(MismatchError, match="list different images"):
        block_queries(embeddings, manifest, [Slice(0, 0, 2)], STORAGE)


def test_partial_results_survive_storage(best, tmp_path):
    query_ids = np.array([10, 20, 30, 40])
    table = partial_table(best, query_ids)
    assert table.schema == PARTIAL_SCHEMA
    assert table["query_id"].to_pylist() == [10, 10, 10, 30, 40, 40, 40]
    STORAGE.write_table(str(tmp_path / "partial"), table)
    found = read_partial(STORAGE.read_table(str(tmp_path / "partial")), query_ids)
    for name in ("query", "id", "scan_score", "score"):
        assert np.array_equal(getattr(found, name), getattr(best, name))
        assert getattr(found, name).dtype == getattr(best, name).dtype


def test_sources_are_read_from_all_shards(tmp_path):
    ids = np.arange(100, 160)
    vectors = np.random.default_rng(18).standard_normal((60, 4)).astype(np.float16)
    shards = make_index(tmp_path, ids, vectors, make_plan("flat"), np.arange(60) % 3)
    index = Index(str(tmp_path), "d", {}, make_plan("flat"), None, shards, 0, 8, {}, ["owner"], True, {})
    found = read_sources(index, np.array([131, 102, 131, 100, 159]), STORAGE)
    assert found.equals(make_sources(np.array([100, 102, 131, 159])))
    assert len(read_sources(index, np.empty(0, np.int64), STORAGE)) == 0


def test_sources_of_one_shard_are_sorted_by_id(tmp_path):
    ids = np.arange(100, 160)
    vectors = np.random.default_rng(18).standard_normal((60, 4)).astype(np.float16)
    shards = make_index(tmp_path, ids, vectors, make_plan("flat"), np.arange(60) % 3)
    index = Index(str(tmp_path), "d", {}, make_plan("flat"), None, shards, 0, 8, {}, ["owner"], True, {})
    found = read_sources(index, np.array([101, 102, 131, 158]), STORAGE, [1])
    assert found.equals(make_sources(np.array([101, 131, 158])))


def test_wanted_sources_are_distinct_and_sorted_by_shard():
    table = wanted_table(np.array([7, 3, 9, 3, 5, 7]), np.array([1, 0, 1, 0, 0, 1]))
    assert table.to_pydict() == {"shard": [0, 0, 1, 1], "source_id": [3, 5, 7, 9]}
    assert len(wanted_table(np.empty(0, np.int64), np.empty(0, np.int64))) == 0


def test_blocks_have_equal_size_and_cover_every_row_once():
    for num_rows, most, sizes in (
        ([3, 0, 4], 100, [7]),
        ([10_000], 100_000, [1000] * 10),
        ([900, 900, 900], 100_000, [900] * 3),
        ([50_000, 50_000], 2_000, [2000] * 50),
        ([0], 10, []),
    ):
        blocks = plan_blocks(num_rows, most)
        assert [block_rows(block) for block in blocks] == sizes
        seen = [(part.table, row) for block in blocks for part in block for row in range(part.start, part.stop)]
        assert seen == [(unit, row) for unit, rows in enumerate(num_rows) for row in range(rows)]


def test_metadata_names_that_clash_with_columns_are_reserved():
    """Metadata become source_<name> and query_<name>, and share a table with stage and reason before that."""
    for fixed in (ATTRIBUTION_SCHEMA, OUTCOME_SCHEMA):
        for prefix in ("source_", "query_"):
            taken = {name.removeprefix(prefix) for name in fixed if name.startswith(prefix)}
            assert taken - {"owner", "prompt", "steps"} <= RESERVED_COLUMNS
    assert {"id", "key", "uri", "stage", "reason"} <= RESERVED_COLUMNS
