"""The plan of a size: its counts against the jobs' own functions, its machines, what breaks, and the page."""

import random
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from attrib.attribute.blocks import plan_blocks
from attrib.capacity.check import Simulated, check, waves
from attrib.capacity.derive import by_size, derive, schedule
from attrib.capacity.job import with_constants
from attrib.capacity.layout import file_counts, id_bytes, lay_out, simulated_target, task_counts
from attrib.capacity.limits import breaks, growths
from attrib.capacity.page import amount, count, size_chart, write_page
from attrib.capacity.settings import ScaleSettings
from attrib.capacity.work import describe_work
from attrib.common.config import load_settings
from attrib.common.errors import AttribError
from attrib.common.storage import join
from attrib.data.chunks import plan_chunks
from attrib.data.manifest import plan_partitions
from attrib.index.planning import group_partitions

CONFIG = str(Path(__file__).resolve().parents[3] / "configs" / "scale.yaml")


@cache
def shipped() -> ScaleSettings:
    return load_settings(ScaleSettings, CONFIG, ["measure=false", "simulation.num_raylets=[]"])


def settings_of(**target) -> ScaleSettings:
    settings = shipped()
    return settings.model_copy(update={"target": settings.target.model_copy(update=target)})


def cut(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def test_counts_are_those_of_the_jobs_own_functions():
    draw = random.Random(0)
    for _ in range(60):
        sizes = {name: draw.randint(1, 40) for name in ("unit_rows", "partition_rows", "chunk_rows")}
        sizes |= {"shard_rows": draw.randint(1, 200), "query_block_rows": draw.randint(1, 2000)}
        target = settings_of(num_sources=draw.randint(1, 999), num_queries=draw.randint(1, 5000), **sizes).target
        layout = lay_out(target)
        for images, found in ((target.num_sources, layout.sources), (target.num_queries, layout.queries)):
            partitions = plan_partitions(cut(images, target.unit_rows), target.partition_rows)
            rows = [sum(part.stop - part.start for part in partition) for partition in partitions]
            assert found.num_units == len(cut(images, target.unit_rows))
            assert found.num_partitions == len(partitions)
            assert found.num_slices == sum(map(len, partitions))
            assert found.num_chunks == sum(len(plan_chunks(n, 0, target.chunk_rows)) for n in rows)
        rows = cut(target.num_sources, target.partition_rows)
        groups = group_partitions(rows, target.shard_rows)
        assert layout.num_shards == len(groups)
        assert layout.shard_vectors == max(sum(rows[p] for p in group) for group in groups)
        blocks = plan_blocks(cut(target.num_queries, target.partition_rows), target.query_block_rows)
        assert (layout.num_blocks, layout.num_query_slices) == (len(blocks), sum(map(len, blocks)))


@pytest.mark.parametrize("num_rows, num_ids", [(400, 160), (5_000, 100_000), (40_000, 2_000)])
def test_bytes_of_ids_are_those_of_a_file(num_rows, num_ids, local, tmp_path):
    def size(ids: np.ndarray) -> int:
        local.write_table(str(tmp_path / "ids.parquet"), pa.table({"id": ids}))
        return (tmp_path / "ids.parquet").stat().st_size

    generator = np.random.default_rng(1)
    ids = generator.choice(generator.integers(0, 2**62, num_ids), num_rows)
    assert size(ids) - size(ids[:0]) == pytest.approx(id_bytes(num_rows, num_ids), rel=0.1, abs=200)


def test_a_plan_takes_the_fewest_machines_that_meet_each_deadline():
    settings = settings_of()
    plan = derive(settings)
    for phase, deadline in plan.deadlines.items():
        assert plan.hours(phase) <= deadline
        fewer = plan.num_machines | {phase: plan.num_machines[phase] - 1}
        if fewer[phase]:
            assert (
                by_size(settings, replace(plan, num_machines=fewer), [settings.target.num_sources])[0].hours(phase)
                > deadline
            )
    bytes_kept = sum(files.num_bytes for files in plan.files.values() if files.kept)
    assert plan.kept_bytes == bytes_kept > 1e9 * 2 * 256 * 2  # vectors as embedded, and in the index
    for stage in plan.stages:
        rest = max(hours for name, hours in stage.bounds.items() if name != "driver")
        assert stage.hours == pytest.approx(stage.bounds["driver"] + rest)


def test_a_deadline_that_no_number_of_machines_meets_is_refused():
    with pytest.raises(AttribError, match=r"with any number of machines and may take 0.01 h"):
        derive(settings_of(night_hours=0.01))


def test_equal_tasks_run_in_waves_and_memory_limits_them():
    settings = settings_of()
    work = next(w for w in describe_work(settings, lay_out(settings.target), 512) if w.name == "search")
    machine = settings.machines[work.machine]
    task_hours = work.core_seconds / work.num_tasks / 3600
    full = schedule(work, 2, settings).bounds["compute"]
    assert full == pytest.approx(task_hours * -(-work.num_tasks // (2 * machine.num_cpus)))
    heavy = replace(work, memory_bytes=machine.memory_gib * 2**30 / 3)
    assert schedule(heavy, 2, settings).bounds["compute"] == pytest.approx(task_hours * -(-work.num_tasks // 6))
    with pytest.raises(AttribError, match=r"lower target.shard_rows"):
        schedule(replace(work, memory_bytes=machine.memory_gib * 2**30 * 2), 2, settings)


def test_cost_is_linear_in_the_sources_where_images_dominate():
    settings = settings_of()
    small, large = by_size(settings, derive(settings), [10**8, 10**9])
    assert large.cost("sources") / small.cost("sources") == pytest.approx(10, rel=0.1)
    assert large.cost("queries") / small.cost("queries") < 10


def test_what_breaks_does_so_at_the_size_that_is_told():
    settings = settings_of(sidecar_row_bytes=30)
    found = breaks(settings)
    assert {b.growth.name for b in found} == {growth.name for growth in growths(settings)}
    sizes = [b.num_sources for b in found if b.num_sources]
    assert sizes == sorted(sizes) and len(sizes) >= 15

    def at(growth, num_sources: int) -> float:
        return growth.amount(lay_out(settings.target.model_copy(update={"num_sources": num_sources})))

    for b in found:
        if b.num_sources:
            assert at(b.growth, b.num_sources) > b.growth.limit >= at(b.growth, round(b.num_sources / 1.002))
        order = {"linear": 10, "quadratic": 100}[b.growth.order]
        if b.growth.unit != "images per block" and "records of all shards" not in b.growth.name:
            assert at(b.growth, 10**11) / at(b.growth, 10**10) == pytest.approx(order, rel=0.03), b.growth.name
    sidecar = next(b for b in found if "metadata table" in b.growth.name)
    machine = settings.machines[settings.target.embed_on]
    core_seconds = machine.num_cpus * settings.target.build_hours * 3600
    scanned = core_seconds * settings.constants.scan_bytes_per_second.value
    assert sidecar.num_sources == pytest.approx((scanned * settings.target.partition_rows / 30) ** 0.5, rel=0.01)


def test_kinds_of_index_differ_in_their_files():
    settings = settings_of(kind="ivf_sq8")
    files = file_counts(lay_out(settings.target), settings.target, settings.constants)
    assert files["index/shard-#/codes.npy"].num_bytes == pytest.approx(256e9, rel=0.001)
    flat = settings_of(kind="flat", num_sources=10_000)
    layout = lay_out(flat.target)
    assert "index/template.faiss" not in file_counts(layout, flat.target, flat.constants)
    tasks = task_counts(layout, flat.target, 64)
    assert "index: _train_task" not in tasks and "attributions/_partials/exact/shard-#.parquet" not in file_counts(
        layout, flat.target, flat.constants
    )
    assert tasks["index: _search_held_out_task"] == layout.num_shards


def test_waves_are_those_of_dealing_in_turn():
    for tasks in range(1, 40):
        for nodes in range(1, 9):
            dealt = np.bincount(np.arange(tasks) % nodes, minlength=nodes)
            assert waves(tasks, nodes) == pytest.approx(dealt.max() / dealt.mean())


def simulated(settings: ScaleSettings, num_raylets: int = 2) -> Simulated:
    """A simulation that did what is foretold, but for one task too many and one kind of file twice as large."""
    target = simulated_target(settings.simulation, settings.target, 64)
    layout = lay_out(target)
    tasks = {name: [n, 0] for name, n in task_counts(layout, target, 2).items() if not name.endswith("chunks")}
    tasks["index: _build_task"][1] += 1
    files = file_counts(layout, target, settings.constants)
    sizes = {pattern: int(f.num_bytes) for pattern, f in files.items()}
    sizes["index/shard-#/ids.npy"] *= 2
    writes = {pattern: [f.num_files, 0] for pattern, f in files.items()}
    return Simulated(num_raylets, 64, tasks, writes, sizes | {"index/index.json": 77}, {}, {"index": 3.0}, 5, 0.004)


def test_a_check_tells_what_differs():
    found = check(settings_of(), simulated(settings_of()))
    assert [(row.name, row.measured - row.predicted) for row in found.tasks if row.predicted != row.measured] == [
        ("index: _build_task", 1)
    ]
    assert [row.name for row in found.num_bytes if row.ratio > 1.5] == ["index/shard-#/ids.npy"]
    assert found.other_bytes == 77
    assert {b.measured for b in found.balances if b.name != "index: _build_task"} == {2.0}


def test_the_page_shows_all_and_escapes_strangers_text(local, tmp_path):
    evil = "<script>alert(1)</script>"
    settings = settings_of().model_copy(update={"output": str(tmp_path), "hardware": evil})
    settings = settings.model_copy(update={"prices": settings.prices.model_copy(update={"currency": "<b>EUR"})})
    plan = derive(settings)
    sized = by_size(settings, plan, [10**5, 10**7, 10**8, 10**9])
    checks = [check(settings, simulated(settings))]
    page = Path(write_page(settings, plan, sized, breaks(settings), checks, {"x": evil}, local)).read_text("utf-8")
    assert evil not in page and "<b>EUR" not in page and "&lt;script&gt;" in page
    for said in ("1 billion sources", "embed sources", "ids of all images in the driver", "image_bytes", "_build_task"):
        assert said in page
    drawn = ElementTree.fromstring(size_chart(sized, "<b>EUR"))
    lines = [e.attrib["points"].split() for e in drawn.iter("{http://www.w3.org/2000/svg}polyline")]
    assert len(lines) == 4 and all(len(line) == 4 for line in lines)


def test_numbers_are_told_with_their_units():
    assert amount(3 * 2**40, "bytes") == "3 TiB" and amount(512, "bytes") == "512 bytes"
    assert amount(7200, "core seconds") == "2 core hours" and amount(12, "requests") == "12 requests"
    assert count(1_230_000) == "1.23 million" and count(999) == "999" and count(0.25) == "0.25"


def test_a_benchmark_stands_in_for_the_config_where_its_units_agree(local, tmp_path):
    uri = join(str(tmp_path), "benchmark.json")
    given = {"value": 900.0, "unit": "images/s", "command": "python -m jobs.benchmark"}
    local.write_json(uri, {"constants": {"decode_images_per_second": given, "something_else": given}})
    settings = settings_of().model_copy(update={"benchmark": uri})
    constants = with_constants(settings, local).constants
    assert (
        constants.decode_images_per_second.value == 900
        and "jobs.benchmark" in constants.decode_images_per_second.source
    )
    assert constants.image_bytes == settings.constants.image_bytes
    local.write_json(uri, {"constants": {"image_bytes": given}})
    with pytest.raises(AttribError, match="gives image_bytes in 'images/s', not 'bytes'"):
        with_constants(settings, local)


@pytest.mark.parametrize(
    "override, message",
    [
        ("target.embed_on=nowhere", "no machine of the config; it has encoder, searcher"),
        ("machines.encoder.num_gpus=8", "need constants.forward_images_per_gpu_second"),
        ("output=s3://bucket/x", "give output a local path"),
        ("constants.image_bytes.value=0", "greater than 0"),
    ],
)
def test_a_wrong_config_is_refused(override, message):
    with pytest.raises(AttribError, match=message):
        load_settings(ScaleSettings, CONFIG, [override])


def test_gpus_move_the_network_off_the_cores():
    on_cpus = settings_of()
    constants = on_cpus.constants.model_copy(
        update={"forward_images_per_gpu_second": on_cpus.constants.decode_images_per_second}
    )
    machines = on_cpus.machines | {"encoder": on_cpus.machines["encoder"].model_copy(update={"num_gpus": 4})}
    on_gpus = on_cpus.model_copy(update={"constants": constants, "machines": machines})
    embed = [
        next(w for w in describe_work(s, lay_out(s.target), 64) if w.name == "embed sources")
        for s in (on_cpus, on_gpus)
    ]
    assert embed[0].gpu_seconds == 0 < embed[1].gpu_seconds and embed[1].core_seconds < embed[0].core_seconds
    assert embed[1].moved_bytes == 3 * 224**2 * 10**9  # pixels between decoders and encoders
