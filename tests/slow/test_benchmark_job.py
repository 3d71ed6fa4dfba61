"""The whole benchmark at its smallest."""

import json
import os

import pytest

from attrib.benchmark import images, job
from attrib.benchmark.harness import Clock, Contender, compare, run_contender
from attrib.benchmark.job import Bench
from attrib.benchmark.settings import BenchmarkSettings

pytestmark = pytest.mark.timeout(1800)  # every contender is a process that loads its libraries


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> BenchmarkSettings:
    return BenchmarkSettings.model_validate(
        {
            "output": str(tmp_path_factory.mktemp("benchmark")),
            "backbone": {"name": "test_resnet", "weights": "random"},
            "num_rounds": 1,
            "num_workers": 1,
            "num_drawn": 12,
            "image_px": 64,
            "images": {"num_images": 8, "min_megapixels": 0.02, "max_megapixels": 0.05, "loader_images": 8},
            "vectors": {
                "sizes": [1500],
                "dimension": 16,
                "map_px": 256,
                "gaussian_size": None,
                "batches": [8, 80],
                "threads": [1],
                "more_nprobes": [],
                "slow_peer_queries": 40,
                "argsort_queries": 4,
            },
        }
    )


def test_decoders_see_the_same_images(settings, one_thread):
    jpegs = Bench(settings).jpegs
    job = {"folder": jpegs, "num_images": 8, "backbone": settings.backbone.model_dump()}
    for decode in (images.decode_and_resize, images.pillow):
        clock = Clock()
        assert decode(job, clock) == {"num_images": 8}
        assert 0 < clock.laps["image"]["seconds"] < 1
    clock = Clock()
    found = images.data_loader(job | {"loaders": 0}, clock)
    assert found["num_vectors"] == 8 and clock.laps["image"]["seconds"] == pytest.approx(1 / found["images_per_second"])


def test_every_stage_at_its_smallest(settings, monkeypatch):
    monkeypatch.setattr(job, "ENCODE_SECONDS", 0.2)
    measured: list[Contender] = []

    def noted(stage: str, sizes: dict, contenders: list[Contender], num_rounds: int) -> list[dict]:
        measured.extend(contenders)
        return compare(stage, sizes, contenders, num_rounds)

    monkeypatch.setattr(job, "compare", noted)
    result = job.run(settings)
    with open(os.path.join(settings.output, "benchmark.json"), encoding="utf-8") as file:
        written = json.load(file)
    assert written == json.loads(json.dumps({name: value for name, value in result.items() if name != "table"}))
    assert set(written) == {"rows", "facts", "constants", "minutes", "num_cpus", "settings", "versions"}
    names = {
        "decode + resize": {"attrib.data.decoding", "attrib.data.decoding, full size", "Pillow loop"},
        "embed": {"attrib, decode + encode", "network alone", "DataLoader script, 0 loader(s)"},
        "build": {"attrib", "faiss.index_factory", "autofaiss", "attrib.index.shard"}
        | {"faiss, Parquet to index file", "faiss index.add"},
        "search": {"attrib.index.search", "faiss index.search", "faiss.contrib big_batch_search"}
        | {"argsort per query (AbC)"},
    }
    assert {(row["stage"], row["contender"]) for row in written["rows"]} == {
        (stage, name) for stage, found in names.items() for name in found
    }
    for row in written["rows"]:
        if row["contender"] == "autofaiss":
            assert row["seconds"] is None and row["note"].startswith("not measured: no environment in ")
            continue
        assert row["lowest"] <= row["seconds"] <= row["highest"]
        assert row["ratio_lowest"] <= row["ratio"] <= row["ratio_highest"]
        assert row["cpu_seconds"] >= 0 and 10 < row["peak_mib"] < 4000 and row["threads"] == 1
    searched = {(row["contender"], row["size"]): row for row in written["rows"] if row["stage"] == "search"}
    assert len(searched) == 8 and all(0.99 <= row["found"]["recall"] <= 1 for row in searched.values())
    # One round is measured, so the second answer is asked for here.
    (ours,) = [contender for contender in measured if contender.name == "attrib.index.search"]
    again = run_contender(ours)["found"]["answers"]
    for (contender, size), row in searched.items():
        if contender == "attrib.index.search":
            assert row["found"]["answers"] == again
        # The same lists and nprobe: the same neighbours, but for ties.
        if contender.startswith("faiss"):
            ours = searched["attrib.index.search", size]
            assert row["found"]["recall"] == pytest.approx(ours["found"]["recall"], abs=0.005)
        if contender.startswith("argsort"):
            assert row["found"]["recall"] == 1 and f"timed on 1/{2 if size.startswith('8 ') else 20}" in row["note"]
    known = written["constants"]
    assert known["search_seconds_largest_batch"]["value"] > 0
    # An embedding takes 2 bytes per value and 8 for the id; the index stores both again, with norms.
    assert 2 * 16 <= known["embedding_bytes_per_image"]["value"] < 200
    assert 2 * 16 + 12 <= known["index_bytes_per_vector"]["value"] < 400
    assert known["decode_images_per_second"]["unit"] == "images/s"
    again = Bench(settings)  # keeps inputs and deletes work
    assert os.listdir(again.inputs) and not [name for name in os.listdir(again.work) if name.startswith("images-")]
