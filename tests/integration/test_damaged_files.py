"""No stage answers from a damaged file: every file of a run, damaged in several ways, is refused by its reader."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from support.damage import damages
from support.files import LOCAL
from support.generators import drawn_file
from support.identify import TRACES, registered
from support.images import pictures, write_folder

from attrib.attribute.report import open_run, write_report
from attrib.attribute.rows import read_sources
from attrib.attribute.settings import ReportSettings
from attrib.common.errors import AttribError
from attrib.data.manifest import Slice, open_manifest, sampled_images
from attrib.embed.embeddings import open_embeddings, read_vectors
from attrib.generators.identify.files import block_verdicts, open_identified
from attrib.generators.registry.registry import open_registry
from attrib.index.index import open_index
from attrib.index.shard import open_shard
from attrib.pipeline import job as pipeline_job
from attrib.pipeline.settings import PipelineSettings


def read_index(run: Path):
    index = open_index(str(run / "index"), LOCAL)
    quantizer = index.read_quantizer(LOCAL)
    return open_shard(index.shard_uri(0), index.shards[0], LOCAL, str(run), quantizer)


def read_registry(run: Path):
    registry = open_registry(str(run / "registry"), LOCAL)
    return [registry.read(entry, LOCAL) for entry in registry.active]


READERS = {
    "sources/manifest/manifest.json": lambda run: open_manifest(str(run / "sources/manifest"), LOCAL),
    "sources/manifest/part-00000.parquet": lambda run: sampled_images(
        open_manifest(str(run / "sources/manifest"), LOCAL), 10**6, LOCAL
    ),
    "sources/embeddings/embeddings.json": lambda run: open_embeddings(str(run / "sources/embeddings"), LOCAL),
    "sources/embeddings/part-00000.parquet": lambda run: read_vectors(
        open_embeddings(str(run / "sources/embeddings"), LOCAL), 0, LOCAL
    ),
    "index/index.json": lambda run: open_index(str(run / "index"), LOCAL),
    "index/template.faiss": read_index,
    "index/shard-00000/ids.npy": read_index,
    "index/shard-00000/vectors.npy": read_index,
    "index/shard-00000/inverse_norms.npy": read_index,
    "index/shard-00000/offsets.npy": read_index,
    "index/shard-00000/codes.npy": read_index,
    "index/shard-00000/sources.parquet": lambda run: read_sources(
        open_index(str(run / "index"), LOCAL), np.arange(3), LOCAL
    ),
    "generators/generators.json": lambda run: open_identified(str(run / "generators"), LOCAL),
    "generators/verdicts/part-00000.parquet": lambda run: block_verdicts(
        open_identified(str(run / "generators"), LOCAL), [Slice(0, 0, 1)], LOCAL
    ),
    "attributions/attributions.json": lambda run: open_run(str(run / "attributions"), LOCAL),
    "attributions/attributions/block-00000.parquet": lambda run: open_run(str(run / "attributions"), LOCAL),
    "attributions/outcomes/block-00000.parquet": lambda run: open_run(str(run / "attributions"), LOCAL),
    "registry/registry.json": read_registry,
    "registry/references/camera.npy": read_registry,
    "registry/references/nearest.npy": read_registry,
}
NOT_READ_LATER = {
    "started.json",
    "failures.parquet",
    "candidates.parquet",
    "share_draws.npy",
    "shard.json",
    "template.json",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, local_ray) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_folder(pictures([f"s{i}.jpg" for i in range(60)]), str(folder / "in/sources"), LOCAL)
    generated = {f"{trace}-{i}.png": drawn_file(trace, 500 + i) for trace in TRACES for i in range(3)}
    write_folder(generated, str(folder / "in/generated"), LOCAL)
    settings = PipelineSettings(
        sources={"name": "sources", "uri": str(folder / "in/sources")},
        generated={"name": "generated", "uri": str(folder / "in/generated")},
        backbone={"name": "test_resnet", "weights": "random"},
        index={"kind": "ivf_sq8", "num_lists": 4},
        identify={"registry": registered(str(folder / "other"))},
        output=str(folder / "out"),
    )
    pipeline_job.run(settings)
    return shutil.copytree(folder / "other", folder / "out", dirs_exist_ok=True)


def located(run: Path, name: str) -> Path:
    """The file of a name in the table; names of references hold a digest."""
    if "references" not in name:
        return run / name
    (found,) = (run / "registry/references").glob(f"{Path(name).stem}-*.npy")
    return found


def test_the_table_names_every_file_that_a_later_stage_reads(run):
    there = {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file() and not p.name.startswith(".")}
    known = {located(run, name).relative_to(run).as_posix() for name in READERS}
    # The same stages write the generated images, and references of all generators.
    others = {name for name in there - known if Path(name).name not in NOT_READ_LATER}
    assert {name for name in others if not name.startswith(("generated/", "registry/references/", "method/"))} == {
        "report.html"
    }


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_refused_by_name(name, run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    file = located(copy, name)
    data, answer = file.read_bytes(), READERS[name](copy)
    for damage, content in damages(data).items():
        file.write_bytes(content)
        try:
            read = READERS[name](copy)
        except AttribError as error:
            assert file.name in str(error), damage
        else:  # the padding of an array's header holds nothing
            is_array = name.startswith("registry/references")
            assert is_array and all(np.array_equal(*pair, equal_nan=True) for pair in zip(read, answer)), damage
    file.unlink()
    with pytest.raises(AttribError, match=file.name):
        READERS[name](copy)


@pytest.mark.parametrize(
    "name",
    [
        "sources/embeddings/embeddings.json",
        "sources/manifest/manifest.json",
        "sources/manifest/part-00000.parquet",
        "generated/manifest/part-00000.parquet",
        "generators/generators.json",
    ],
)
def test_a_page_is_not_made_without_a_word_from_what_is_damaged(name, run, tmp_path):
    settings = ReportSettings(attributions=str(run / "attributions"), output=str(tmp_path / "page.html"))
    whole = (run / name).read_bytes()
    try:
        for kind, damaged in damages(whole).items():
            (run / name).write_bytes(damaged)
            with pytest.raises(AttribError, match=name):
                pytest.fail(f"{kind}: {write_report(settings)}")
    finally:
        (run / name).write_bytes(whole)
    assert write_report(settings)["num_missing_images"] == 0
