"""The predicted numbers of tasks and files against a real run of all jobs."""

import re
from collections import Counter
from pathlib import Path

import pytest
from support.hostile import encode
from support.images import picture, tar_bytes

from attrib.attribute.rows import ATTRIBUTIONS_RECORD
from attrib.capacity.job import with_constants
from attrib.capacity.layout import file_counts, lay_out, task_counts
from attrib.capacity.settings import ScaleSettings
from attrib.common.config import load_settings
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage
from attrib.data.manifest import MANIFEST_RECORD
from attrib.embed.embeddings import EMBEDDINGS_RECORD
from attrib.index.index import INDEX_RECORD
from attrib.pipeline import job as pipeline_job
from attrib.pipeline.settings import PipelineSettings

CONFIG = str(Path(__file__).resolve().parents[2] / "configs" / "scale.yaml")
SOURCES, QUERIES, TAR_ROWS = 75, 45, 30
PARTITION_ROWS, CHUNK_ROWS, SHARD_ROWS, BLOCK_ROWS, NUM_LISTS = 32, 12, 64, 20, 4
RECORDS = {
    "sources/manifest": MANIFEST_RECORD,
    "sources/embeddings": EMBEDDINGS_RECORD,
    "generated/manifest": MANIFEST_RECORD,
    "generated/embeddings": EMBEDDINGS_RECORD,
    "index": INDEX_RECORD,
    "attributions": ATTRIBUTIONS_RECORD,
}
LOCAL = Storage(StorageSettings())
pytestmark = pytest.mark.timeout(900)  # one whole pipeline
LEFT_OUT = re.compile(r"\.json$|\.json\.lock$|/failures\.parquet$|^report\.html$")  # small files, not predicted


def files_below(folder: Path, root: Path) -> Counter:
    """Number of files by path relative to `root`, with # for every number."""
    paths = (path.relative_to(root).as_posix() for path in folder.rglob("*") if path.is_file())
    return Counter(re.sub(r"\d+", "#", path) for path in paths if not LEFT_OUT.search(path))


@pytest.fixture(scope="module")
def finished(local_ray, tmp_path_factory) -> tuple[Path, Counter]:
    """Output of a pipeline, and its files by pattern. Temporary files are counted before a job deletes them."""
    folder = tmp_path_factory.mktemp("counts")
    root, found = folder / "run", Counter()
    for role, count, first in (("sources", SOURCES, 0), ("generated", QUERIES, 1000)):
        write_shards(folder / role, count, first)
    delete_folder = Storage.delete_folder

    def counted_delete(storage: Storage, uri: str) -> None:
        found.update(files_below(Path(uri), root))
        delete_folder(storage, uri)

    settings = PipelineSettings(
        **{
            role: {"name": role, "uri": str(folder / role), "format": "webdataset"} for role in ("sources", "generated")
        },
        output=str(root),
        backbone={"name": "test_vit", "weights": "random"},
        manifest={"partition_rows": PARTITION_ROWS},
        embed={"chunk_rows": CHUNK_ROWS, "device": "cpu", "num_workers": 1},
        # Any recall meets this target, so the held-out images are searched once exactly and once in the lists.
        index={"shard_rows": SHARD_ROWS, "kind": "ivf_flat", "num_lists": NUM_LISTS, "held_out_rows": 8}
        | {"recall_target": 0.001},
        attribute={"query_block_rows": BLOCK_ROWS, "nprobe": NUM_LISTS, "engine": "lists", "device": "cpu"}
        | {"recall_check_queries": 8},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Storage, "delete_folder", counted_delete)
        pipeline_job.run(settings)
    return root, found + files_below(root, root)


def write_shards(folder: Path, count: int, first: int) -> None:
    for start in range(0, count, TAR_ROWS):
        images = {
            f"{i:09d}.jpg": encode(picture(first + i), "JPEG") for i in range(start, min(count, start + TAR_ROWS))
        }
        LOCAL.write_bytes(str(folder / f"{start:06d}.tar"), tar_bytes(images))


@pytest.fixture(scope="module")
def settings() -> ScaleSettings:
    shipped = load_settings(ScaleSettings, CONFIG)
    target = {"num_sources": SOURCES, "num_queries": QUERIES, "unit_rows": TAR_ROWS, "partition_rows": PARTITION_ROWS}
    target |= {"chunk_rows": CHUNK_ROWS, "shard_rows": SHARD_ROWS, "query_block_rows": BLOCK_ROWS}
    target |= {"kind": "ivf_flat", "num_lists": NUM_LISTS, "nprobe": NUM_LISTS, "held_out_rows": 8, "dimension": 64}
    target |= {"num_recall_passes": 1, "recall_check_queries": 8}
    return shipped.model_copy(update={"target": shipped.target.model_copy(update=target)})


def test_recorded_tasks_and_files_are_those_predicted(finished, settings, local):
    root, found = finished
    layout = lay_out(settings.target)
    predicted = task_counts(layout, settings.target, num_cpus=2)
    files = file_counts(layout, settings.target, settings.constants)
    records = {job: local.read_json(str(root / job / name)) for job, name in RECORDS.items()}
    assert {job: record["num_tasks"] for job, record in records.items()} == predicted
    assert dict(found) == {pattern: kind.num_files for pattern, kind in files.items()}
    for job, record in records.items():
        kept = sum(kind.num_files for pattern, kind in files.items() if pattern.startswith(f"{job}/") and kind.kept)
        assert record["num_files"] == kept, job


def test_constants_come_from_the_records_of_a_run(finished, settings, local):
    root, _ = finished
    read = with_constants(settings.model_copy(update={"run": str(root)}), local).constants
    rates = local.read_json(str(root / "index" / INDEX_RECORD))["rates"]
    assert read.list_visit_seconds.value == rates["per_list"]
    assert read.list_visit_seconds.source == f"records of {root}"
    # Rows of so few images still lie near the measured bytes per row; a sum instead of a mean would be far off.
    for name in ("manifest_row_bytes", "embedding_row_bytes", "attribution_row_bytes", "outcome_row_bytes"):
        assert getattr(read, name).value < 40 * getattr(settings.constants, name).value, name
    assert read.image_bytes == settings.constants.image_bytes
