"""The whole pipeline on small images: on S3, and equal results for every layout and number of workers."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from support.hostile import encode
from support.images import picture, write_folder, write_tars

from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage, join
from attrib.pipeline import job as pipeline_job
from attrib.pipeline.settings import PipelineSettings

NUM_SOURCES, NUM_GENERATED = 90, 25
BACKBONE = {"name": "test_resnet", "weights": "random"}
LOCAL = Storage(StorageSettings())
LICENCES = ("CC0", "CC BY 4.0", "proprietary")


@pytest.fixture(scope="module")
def images() -> dict[str, dict[str, bytes]]:
    """Sources, one with copies (so that ties occur), and generated images, one a copy of a source and one broken."""
    sources = {f"{i % 4}/source {i:03d}.jpg": encode(picture(i), "JPEG") for i in range(NUM_SOURCES)}
    for i in range(12):
        sources[f"copies/{i:03d}.jpg"] = sources["0/source 000.jpg"]
    generated = {f"generated-{i:03d}.png": encode(picture(1000 + i), "PNG") for i in range(NUM_GENERATED)}
    generated["copy.jpg"] = sources["0/source 000.jpg"]
    generated["broken.jpg"] = encode(picture(7), "JPEG")[:100]
    return {"sources": sources, "generated": generated}


def run_flow(uri: str, output: str, storage: Storage, format: str = "folder", **sections) -> pa.Table:
    """Attribution rows of a whole pipeline, sorted by query and rank."""
    settings = PipelineSettings(
        sources={
            "name": "sources",
            "uri": join(uri, "sources"),
            "format": format,
            "metadata": {"uri": join(uri, "owners.csv")},
        },
        generated={"name": "generated", "uri": join(uri, "generated")},
        output=output,
        backbone=BACKBONE,
        storage=storage.settings,
        **{"manifest": {"partition_rows": 50}, "embed": {"chunk_rows": 16, "num_workers": 1}} | sections,
    )
    pipeline_job.run(settings)
    rows = read_rows(output, "attributions", storage)
    return rows.sort_by([("query_id", "ascending"), ("rank", "ascending")])


def read_rows(output: str, kind: str, storage: Storage) -> pa.Table:
    folder = join(output, "attributions", kind)
    return pa.concat_tables(
        [storage.read_table(join(folder, name)) for name in storage.names(folder, suffix=".parquet")]
    )


def write_owners(uri: str, images: dict, storage: Storage) -> None:
    lines = [f'"{key}",studio {len(key) % 3},{LICENCES[i % 3]}' for i, key in enumerate(images["sources"])]
    storage.write_bytes(join(uri, "owners.csv"), "\n".join(["key,owner,licence", *lines]).encode())


@pytest.fixture(scope="module")
def corpus(images, tmp_path_factory) -> str:
    uri = str(tmp_path_factory.mktemp("corpus"))
    for role in ("sources", "generated"):
        write_folder(images[role], join(uri, role), LOCAL)
    write_owners(uri, images, LOCAL)
    return uri


@pytest.fixture(scope="module")
def reference(local_ray, corpus, tmp_path_factory) -> tuple[str, pa.Table]:
    output = str(tmp_path_factory.mktemp("reference") / "run")
    return output, run_flow(corpus, output, LOCAL)


def test_every_generated_image_has_one_outcome(reference):
    outcomes = read_rows(reference[0], "outcomes", LOCAL)
    assert len(outcomes) == NUM_GENERATED + 2 == len(pc.unique(outcomes["query_id"]))
    failed = outcomes.filter(pc.equal(outcomes["status"], "failed")).to_pylist()
    assert [(row["query_key"], row["stage"], row["num_sources"], row["top_source_id"]) for row in failed] == [
        ("broken.jpg", "decode", 0, None)
    ]
    assert failed[0]["reason"]


def test_rows_hold_metadata_digests_and_shares_that_sum_to_one(reference):
    rows = reference[1]
    assert rows.schema.names[:5] == ["query_id", "rank", "source_id", "similarity", "share"]
    assert {"source_owner", "source_licence", "run_id", "model_digest", "index_digest"} <= set(rows.schema.names)
    by_query = rows.group_by("query_id").aggregate([("share", "sum"), ("rank", "count"), ("run_id", "count_distinct")])
    assert np.allclose(by_query["share_sum"].to_numpy(), 1.0) and set(by_query["rank_count"].to_pylist()) == {10}
    assert rows["source_owner"].null_count == 0


def test_copies_tie_and_the_lower_id_comes_first(reference):
    rows = reference[1].filter(pc.equal(reference[1]["query_key"], "copy.jpg"))
    assert np.all(rows["similarity"].to_numpy() > 0.999)
    assert rows["source_id"].to_pylist() == sorted(rows["source_id"].to_pylist())
    assert len(set(rows["source_key"].to_pylist())) == 10


def check_same_rows(rows: pa.Table, expected: pa.Table) -> None:
    for column in ("query_id", "rank", "source_id", "similarity", "share", "source_key", "source_owner"):
        assert rows[column].equals(expected[column]), column


@pytest.mark.parametrize(
    "layout",
    [
        {"embed": {"chunk_rows": 7, "num_workers": 2}, "manifest": {"partition_rows": 20}, "index": {"shard_rows": 40}},
        {
            "index": {"shard_rows": 50, "kind": "ivf_flat", "num_lists": 4, "held_out_rows": 5},
            "attribute": {"nprobe": 4},
        },
        {
            "index": {"kind": "ivf_sq8", "num_lists": 4, "rerank_factor": 100},
            "attribute": {"nprobe": 4, "query_block_rows": 10},
        },
    ],
    ids=[
        "two workers, small chunks",
        "all lists of IVF-Flat",
        "all lists of SQ8, several blocks",
    ],
)
def test_results_do_not_depend_on_the_layout(layout, reference, corpus, tmp_path):
    if layout.keys() <= {"index", "attribute"}:  # the same embeddings, found as finished
        for role in ("sources", "generated"):
            shutil.copytree(join(reference[0], role), tmp_path / "run" / role)
    rows = run_flow(corpus, str(tmp_path / "run"), LOCAL, **layout)
    check_same_rows(rows, reference[1])


def test_the_whole_pipeline_on_s3_from_tar_shards(reference, images, s3_endpoint):
    """The same results from another store, another format, and several index shards."""
    storage = Storage(StorageSettings(endpoint=s3_endpoint))
    uri = "s3://attrib/flow"
    write_tars(images["sources"], join(uri, "sources"), storage, num_shards=3)
    write_folder(images["generated"], join(uri, "generated"), storage)
    write_owners(uri, images, storage)
    layout = {"format": "webdataset", "manifest": {"partition_rows": 33}, "index": {"shard_rows": 33}}
    rows = run_flow(uri, join(uri, "run"), storage, **layout)
    check_same_rows(rows, reference[1])
    page = storage.read_bytes(join(uri, "run", "report.html")).decode()
    assert "data:image/jpeg;base64," in page and "studio" in page
