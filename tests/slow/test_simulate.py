"""The jobs on raylets of this machine: what they make is what the plan's formulas foretell."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from attrib.capacity.check import check
from attrib.capacity.settings import ScaleSettings, SimulationSettings
from attrib.capacity.simulate import TEMPORARY, draw_tars, pattern_of, simulate
from attrib.capacity.storage_log import LOG_FOLDER
from attrib.common.config import load_settings
from attrib.common.errors import AttribError

CONFIG = str(Path(__file__).resolve().parents[2] / "configs" / "scale.yaml")
SMALL = {"num_sources": 240, "num_queries": 96, "unit_rows": 40, "partition_rows": 32, "chunk_rows": 8}
SMALL |= {"shard_rows": 64, "query_block_rows": 64, "num_lists": 4}
# The rest is JSON records, and tables of failures.
MAX_OTHER_BYTES = 60_000


def run(num_raylets: int, folder: Path):
    settings = load_settings(ScaleSettings, CONFIG, ["measure=false"])
    settings = settings.model_copy(update={"simulation": SimulationSettings(**SMALL)})
    simulated = simulate(settings.simulation, num_raylets, str(folder))
    return simulated, check(settings, simulated)


def holds(found, num_raylets: int) -> None:
    """Tasks and files are exactly the foretold ones, bytes within a quarter, requests within a twentieth."""
    assert {row.name: row.measured for row in found.tasks} == {row.name: row.predicted for row in found.tasks}
    assert {row.name: row.measured for row in found.num_files} == {row.name: row.predicted for row in found.num_files}
    for row in found.num_bytes:
        assert row.measured == pytest.approx(row.predicted, rel=0.25), row.name
    assert found.total(found.num_bytes, "").ratio == pytest.approx(1, rel=0.1)
    images, reads, writes = found.requests
    assert images.measured == images.predicted
    # Which workers meet which partitions is chance, and each reads the manifest of those it meets.
    assert reads.measured == pytest.approx(reads.predicted, rel=0.15) and writes.ratio == pytest.approx(1, rel=0.05)
    assert found.other_bytes < MAX_OTHER_BYTES
    for balance in found.balances:
        assert 1 <= balance.predicted <= balance.measured <= num_raylets


def test_two_raylets_do_what_is_foretold_for_them(tmp_path):
    simulated, found = run(2, tmp_path / "two")
    holds(found, 2)
    assert all(sum(by_node) for by_node in zip(*simulated.writes.values()))  # either node took part
    assert simulated.task_seconds > 0 and all(seconds > 0 for seconds in simulated.seconds.values())
    assert LOG_FOLDER not in os.environ
    assert not Path((tmp_path / "two" / TEMPORARY).read_text(encoding="utf-8")).exists()


@pytest.mark.parametrize("num_raylets", [4, 8])
def test_more_raylets_do_so_as_well(num_raylets, tmp_path, request):
    if not request.config.getoption("--long"):
        pytest.skip("takes minutes; --long runs it")
    holds(run(num_raylets, tmp_path / "more")[1], num_raylets)


def test_a_simulation_that_fails_tells_why(tmp_path):
    settings = SimulationSettings(**SMALL, backbone="")
    with pytest.raises(AttribError, match=r"on 1 raylets ended with code 1; the end of .*driver.log:\n(?s:.*)backbone"):
        simulate(settings, 1, str(tmp_path / "failed"))


def test_drawn_tars_hold_the_images_asked_for(tmp_path):
    draw_tars(tmp_path / "drawn", num_images=25, unit_rows=10, image_px=16, seed=0)
    sizes, keys = [], set()
    for path in sorted((tmp_path / "drawn").iterdir()):
        with tarfile.open(path) as tar:
            for member in tar:
                image = Image.open(io.BytesIO(tar.extractfile(member).read()))
                assert (image.format, image.size) == ("JPEG", (16, 16))
                keys.add(member.name)
            sizes.append(len(tar.getnames()))
    assert sizes == [10, 10, 5] and len(keys) == 25


def test_patterns_of_paths():
    uri = "/tmp/run/sources/embeddings/_chunks/part-00001/rows-00000000-00000008.parquet"
    assert pattern_of(uri, "/tmp/run") == "sources/embeddings/_chunks/part-#/rows-#-#.parquet"
