"""The benchmark's clock, harness and vectors against what is known of them, and its Ray-free stages at their smallest."""

import json
import os

import numpy as np
import pytest

from attrib.benchmark import image_contenders, stages, table, vectors
from attrib.benchmark.bench import Bench
from attrib.benchmark.contender import Clock
from attrib.benchmark.facts import constants, find, log_slope, search_slopes
from attrib.benchmark.harness import Contender, compare, run_contender
from attrib.benchmark.settings import BenchmarkSettings
from attrib.common.errors import AttribError

SAMPLES = "tests.support.contenders"


def test_contenders_take_turns_and_are_told_as_ratios(tmp_path):
    log = tmp_path / "log"

    def sleeper(name: str, seconds: float, **more) -> Contender:
        job = {"name": name, "seconds": seconds, "log": str(log), "answers": more.pop("answers", "same")}
        return Contender(name, f"{SAMPLES}:sleeper", job, **more)

    contenders = [
        sleeper("A", 0.1, threads=3),
        sleeper("B", 0.3, max_rounds=1, answers=""),
        Contender("C", f"{SAMPLES}:refuser", {}, may_fail=True),
        Contender("D", f"{SAMPLES}:sleeper", {}, unavailable="pip could not reach anything", may_fail=True),
        sleeper("E", 0.1, answers=""),
    ]
    rows = compare("stage", {"nap": "a nap", "part": "a part"}, contenders, num_rounds=2)
    assert log.read_text() == "ABEAE"
    assert [(row.size, row.contender) for row in rows] == [(s, c) for s in ("a nap", "a part") for c in "ABCDE"]
    nap, part = ({row.contender: row for row in rows if row.size == size} for size in ("a nap", "a part"))
    assert nap["A"].ratio == nap["A"].ratio_lowest == nap["A"].ratio_highest == 1
    assert 0.1 <= nap["A"].lowest <= nap["A"].seconds <= nap["A"].highest
    assert nap["B"].seconds >= 0.3 and nap["B"].ratio > 1 and nap["B"].num_rounds == 1 and "1 round(s)" in nap["B"].note
    assert part["A"].seconds >= 0.1 and "timed on 1/10 of it and scaled" in part["A"].note
    assert nap["C"].seconds is None and "no such library here" in nap["C"].note
    assert nap["D"].note == "not measured: pip could not reach anything"
    assert set(nap["A"].found["environment"].values()) == {"3"}
    assert nap["A"].found["identical"] and not nap["E"].found["identical"]
    shown = table.format_table(rows)
    assert len({len(line.split("note")[0]) for line in shown.splitlines() if "their time / ours" in line}) == 1
    assert "not measured: C ended with code 1" in shown


def test_a_contender_of_ours_that_fails_or_changes_its_threads_ends_the_run():
    with pytest.raises(AttribError, match="no such library here"):
        compare("stage", {"nap": ""}, [Contender("A", f"{SAMPLES}:refuser", {})], num_rounds=1)
    with pytest.raises(AttribError, match="faiss runs 2 threads in place of 1"):
        run_contender(Contender("A", f"{SAMPLES}:thread_changer", {}))


def test_peaks_are_those_of_the_contender_alone():
    here = np.ones(300 << 20, np.uint8)  # in this process, whose memory is none of the contender's
    ended = run_contender(Contender("A", f"{SAMPLES}:filler", {"mib": 128}))
    del here
    # The kernel counts pages in batches, so up to half a MiB may be missing.
    assert ended["start_mib"] + 15 <= ended["laps"]["small"]["peak_mib"] <= ended["start_mib"] + 64
    assert ended["start_mib"] + 120 <= ended["peak_mib"] <= ended["start_mib"] + 180
    assert ended["peak_mib"] < 300 and 120 <= ended["anonymous_mib"] <= ended["peak_mib"]


def test_means_under_windows_are_those_of_the_cells_they_cover():
    generator = np.random.default_rng(0)
    feature_map = generator.standard_normal((5, 5, 4)).astype(np.float32)
    on_grid = vectors._windows(30, 5, generator, off_grid=False)
    assert len(np.unique(on_grid, axis=0)) == 30  # of 36 there are
    off_grid = vectors._windows(50, 5, generator, off_grid=True)
    for windows in (on_grid, off_grid):
        assert (windows[:, 2:] - windows[:, :2] >= 3).all() and windows.min() >= 0 and windows.max() <= 5
        for window, found in zip(windows, vectors._means(feature_map, windows)):
            # What each cell has under the window, as a share of its area.
            edges = np.arange(5)
            rows, columns = (
                np.clip(np.minimum(edges + 1, window[i + 2]) - np.maximum(edges, window[i]), 0, 1) for i in (0, 1)
            )
            weight = rows[:, None] * columns
            expected = (feature_map * weight[:, :, None]).sum((0, 1)) / weight.sum()
            assert np.allclose(found, expected, atol=1e-4)


def test_mosaics_are_means_of_crops_by_area():
    crops = np.eye(40, dtype=np.float32)
    made = np.empty((500, 40), np.float16)
    vectors.fill_with_mosaics(made, crops, seed=0)
    again = np.empty_like(made)
    vectors.fill_with_mosaics(again, crops, seed=0)
    assert np.array_equal(made, again)
    # Of orthogonal crops, each leaves its area's share of the length.
    assert (made >= 0).all() and np.allclose(np.linalg.norm(made.astype(np.float32), axis=1), 1, atol=2e-3)
    num_shown = (made > 1e-3).sum(axis=1)
    assert num_shown.max() == vectors.CROPS_PER_MOSAIC and num_shown.mean() > 3.5
    areas = made.astype(np.float32) / made.astype(np.float32).sum(axis=1, keepdims=True)
    assert areas.sum(axis=0) == pytest.approx(500 / 40, rel=0.5)  # no crop is preferred


def test_slopes():
    assert log_slope(2.0, 20.0, 10) == pytest.approx(1)
    assert log_slope(1.0, 8.0, 4) == pytest.approx(1.5)


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> BenchmarkSettings:
    return BenchmarkSettings.model_validate(
        {
            "output": str(tmp_path_factory.mktemp("benchmark")),
            "backbone": {"name": "test_resnet", "weights": "random"},
            "num_rounds": 2,
            "num_drawn": 12,
            "image_px": 64,
            "images": {"num_images": 8, "min_megapixels": 0.02, "max_megapixels": 0.05},
            "vectors": {
                "sizes": [1500],
                "dimension": 16,
                "map_px": 256,
                "gaussian_size": None,
                "batches": [8, 80],
                "threads": [1],
                "slow_peer_queries": 40,
                "argsort_queries": 4,
                "autofaiss": False,
            },
        }
    )


def test_decoders_see_the_same_images(settings, one_thread):
    jpegs = Bench(settings).jpegs
    job = {"folder": jpegs, "num_images": 8, "backbone": settings.backbone.model_dump()}
    for decode in (image_contenders.decode_and_resize, image_contenders.pillow):
        clock = Clock()
        assert decode(job, clock) == {"num_images": 8}
        assert 0 < clock.laps["image"]["seconds"] < 1
    clock = Clock()
    found = image_contenders.data_loader(job | {"loaders": 0, "loader_batch_size": 2}, clock)
    assert found["num_vectors"] == 8 and clock.laps["image"]["seconds"] == pytest.approx(1 / found["images_per_second"])


def test_build_and_search_at_their_smallest(settings):
    bench = Bench(settings)
    built, searched = stages.build(bench), stages.search(bench)
    assert bench.rows == built + searched
    names = {
        "build": {
            "attrib",
            "faiss.index_factory",
            "attrib.index.shard.build_shard",
            "faiss, Parquet to index file",
            "faiss index.add",
        },
        "search": {
            "attrib.index.search.search_shard",
            "faiss index.search",
            "faiss.knn, exact",
            "argsort per query (AbC)",
        },
    }
    for stage, expected in names.items():
        assert {row.contender for row in bench.rows if row.stage == stage} == expected
    for row in bench.rows:
        assert row.lowest <= row.seconds <= row.highest and row.ratio_lowest <= row.ratio <= row.ratio_highest
        assert row.cpu_seconds >= 0 and 10 < row.peak_mib < 4000 and row.threads == 1
    for row in searched:
        assert 0.99 <= row.found["recall"] <= 1
    exact = find(bench.rows, "search", "faiss.knn, exact", size="80 queries")
    assert exact[0].found["recall"] == 1 and "timed on 1/2 of it" in exact[0].note
    assert all(row.found["identical"] for row in find(bench.rows, "search", "attrib.index.search.search_shard"))
    assert len(search_slopes(bench.rows, (1500,), (8, 80))) == 1
    known = constants(bench.rows, "command")
    assert known["search_seconds_largest_batch"]["value"] > 0
    # An embedding is 2 bytes a number and an id of 8; an index has them again, with norms and rounding to blocks.
    assert 2 * 16 <= known["embedding_bytes_per_image"]["value"] < 200
    assert 2 * 16 + 12 <= known["index_bytes_per_vector"]["value"] < 400
    assert json.loads(json.dumps([row.to_dict() for row in bench.rows]))[0]["stage"] == "build"
    again = Bench(settings)  # keeps inputs and deletes work
    assert os.listdir(again.inputs) and not [name for name in os.listdir(again.work) if name.startswith("images-")]


def test_folders_of_others_are_left_alone(tmp_path, settings):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(AttribError, match=r"holds files that jobs\.benchmark did not make"):
        Bench(settings.model_copy(update={"output": str(tmp_path)}))
    assert (tmp_path / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"output": "s3://bucket/x"}, "needs a local path"),
        ({"vectors": {"sizes": [10, 5]}}, "sizes must ascend"),
        ({"images": {"min_megapixels": 3}}, "is above max_megapixels"),
        ({"only": ["searching"]}, "only"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        BenchmarkSettings.model_validate({"output": "out"} | changes)
