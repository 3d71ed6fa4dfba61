"""Capacity planning: counts against the functions of the jobs, machines, limits, and the printed tables."""

import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml

from attrib.attribute.blocks import plan_blocks
from attrib.capacity.job import amount, count, run, with_constants
from attrib.capacity.layout import ID_BYTES, file_counts, lay_out, task_counts
from attrib.capacity.limits import TEXTS, amounts, breaks
from attrib.capacity.schedule import plan, schedule
from attrib.capacity.settings import Constant, Constants, ScaleSettings
from attrib.capacity.work import describe_work
from attrib.common.config import load_settings
from attrib.common.errors import AttribError
from attrib.common.storage import join
from attrib.data.chunks import plan_chunks
from attrib.data.manifest import plan_partitions
from attrib.index.estimate import IndexTask
from attrib.index.planning import group_partitions

CONFIG = str(Path(__file__).resolve().parents[3] / "configs" / "scale.yaml")


@cache
def shipped() -> ScaleSettings:
    return load_settings(ScaleSettings, CONFIG)


def settings_of(**target) -> ScaleSettings:
    settings = shipped()
    return settings.model_copy(update={"target": settings.target.model_copy(update=target)})


def quick_store(settings: ScaleSettings):
    """Constants of an object store without request limits, so that machines bound the stages."""
    update = {
        name: Constant(value=1e9, source="test") for name in ("reads_per_prefix_second", "writes_per_prefix_second")
    }
    return settings.constants.model_copy(update=update)


def cut(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def test_counts_agree_with_the_functions_of_the_jobs():
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


@pytest.mark.parametrize("num_rows, num_ids", [(5_000, 100_000), (40_000, 1_000_000)])
def test_bytes_of_ids_agree_with_a_parquet_file(num_rows, num_ids, local, tmp_path):
    def size(ids: np.ndarray) -> int:
        local.write_table(str(tmp_path / "ids.parquet"), pa.table({"id": ids}))
        return (tmp_path / "ids.parquet").stat().st_size

    generator = np.random.default_rng(1)
    ids = generator.choice(generator.integers(0, 2**62, num_ids), num_rows)
    assert size(ids) - size(ids[:0]) == pytest.approx(num_rows * ID_BYTES, rel=0.1)


def test_a_plan_uses_the_fewest_machines_that_meet_each_deadline():
    settings = settings_of()
    # Deadlines at which one machine is too slow for either phase.
    target = settings.target.model_copy(update={"build_hours": 90.0, "night_hours": 1.9})
    settings = settings.model_copy(update={"target": target, "constants": quick_store(settings)})
    planned = plan(settings)
    for phase, deadline in (("sources", target.build_hours), ("queries", target.night_hours)):
        assert planned.hours[phase] <= deadline and planned.num_machines[phase] > 1
        fewer = planned.num_machines | {phase: planned.num_machines[phase] - 1}
        assert plan(settings, fewer).hours[phase] > deadline
    files = file_counts(planned.layout, target, settings.constants).values()
    bytes_kept = sum(kind.num_bytes for kind in files if kind.kept)
    assert planned.kept_bytes == bytes_kept > 1e9 * 2 * 256 * 2  # vectors of the embeddings, and of the index
    for stage in planned.stages:
        rest = max(hours for name, hours in stage.bounds.items() if name != "driver")
        assert stage.hours == pytest.approx(stage.bounds["driver"] + rest)


@pytest.mark.parametrize(
    "target", [{}, {"kind": "ivf_sq8", "num_sources": 2_000_000}, {"kind": "flat", "num_sources": 50_000}]
)
def test_every_file_is_written_by_one_stage_and_every_temporary_file_deleted_by_one(target):
    settings = settings_of(**target)
    planned = plan(settings)
    written = sum(stage.work.written_bytes for stage in planned.stages)
    assert written == pytest.approx(planned.kept_bytes + planned.passing_bytes)
    files = file_counts(planned.layout, settings.target, settings.constants).values()
    requests = sum(kind.num_files * (1 if kind.kept else 2) for kind in files)  # a PUT, and a DELETE
    others = planned.layout.num_shards + planned.layout.sources.num_partitions + planned.layout.queries.num_partitions
    assert sum(stage.work.writes for stage in planned.stages) == requests + others


@pytest.mark.parametrize("target", [{"kind": "flat", "num_sources": 50_000}, {"kind": "ivf_flat", "nprobe": 64}])
def test_a_search_takes_the_seconds_of_the_formula(target):
    settings = settings_of(recall_check_queries=0, **target)
    c, layout, num_queries = settings.constants.values(), lay_out(settings.target), settings.target.num_queries
    search = next(w for w in describe_work(settings, layout, "queries", 64) if w.name == "search")
    values, lists = layout.sources.num_images * settings.target.dimension, layout.num_lists
    if not lists:
        expected = num_queries * values * c.block_product_seconds + values * c.value_seconds
    else:
        batches, probed = -(-num_queries // 131_072), 64 / lists
        visited = 1 - (1 - probed) ** (num_queries / batches)  # share of the lists that any query of a batch probes
        opened = visited * (layout.num_shards * lists * c.list_visit_seconds + values * c.value_seconds)
        coarse = num_queries * lists * settings.target.dimension * c.block_product_seconds
        expected = coarse + batches * opened + num_queries * probed * values * c.list_product_seconds
    assert search.core_seconds == pytest.approx(expected)


def test_an_impossible_deadline_is_refused():
    with pytest.raises(AttribError, match=r"with any number of machines and may take 0.01 h"):
        plan(settings_of(night_hours=0.01))


def test_tasks_run_in_rounds_limited_by_cores_and_memory():
    settings = settings_of()
    work = next(w for w in describe_work(settings, lay_out(settings.target), "queries", 512) if w.name == "search")
    machine = settings.machines[work.machine]
    task_hours = work.core_seconds / work.num_tasks / 3600
    full = schedule(work, 2, settings).bounds["compute"]
    assert full == pytest.approx(task_hours * -(-work.num_tasks // (2 * machine.num_cpus)))
    heavy = replace(work, memory_bytes=machine.memory_gib * 2**30 / 3)
    assert schedule(heavy, 2, settings).bounds["compute"] == pytest.approx(task_hours * -(-work.num_tasks // 6))
    with pytest.raises(AttribError, match=r"lower target.shard_rows"):
        schedule(replace(work, memory_bytes=machine.memory_gib * 2**30 * 2), 2, settings)


def test_cost_is_linear_in_the_number_of_sources():
    num_machines = plan(settings_of()).num_machines
    small, large = (plan(settings_of(num_sources=size), num_machines) for size in (10**8, 10**9))
    assert large.cost["sources"] / small.cost["sources"] == pytest.approx(10, rel=0.1)
    assert large.cost["queries"] / small.cost["queries"] < 10


def test_each_limit_is_exceeded_at_the_reported_number_of_sources():
    settings = settings_of(sidecar_row_bytes=30)
    found = breaks(settings)
    keys = {text["what"]: key for key, text in yaml.safe_load(TEXTS.read_text()).items()}
    assert {b.what for b in found} == keys.keys()
    sizes = [b.num_sources for b in found if b.num_sources]
    assert sizes == sorted(sizes) and len(sizes) >= 15

    def at(b, num_sources: int) -> float:
        layout = lay_out(settings.target.model_copy(update={"num_sources": num_sources}))
        amount, limit = amounts(settings, layout)[keys[b.what]]
        assert limit == b.limit
        return amount

    for b in found:
        assert b.at_target == at(b, settings.target.num_sources)
        if b.num_sources:
            assert at(b, b.num_sources) > b.limit >= at(b, b.num_sources - 1)
        order = {"linear": 10, "quadratic": 100}[b.order]
        if b.unit != "images per block" and "records of all shards" not in b.what:
            assert at(b, 10**11) / at(b, 10**10) == pytest.approx(order, rel=0.03), b.what
    sidecar = next(b for b in found if "metadata table" in b.what)
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
    assert tasks["index"][IndexTask.TRAIN] == 0 and tasks["index"][IndexTask.RECALL] == layout.num_shards
    exact = "attributions/_partials/exact/shard-#.parquet"
    assert exact not in file_counts(layout, flat.target, flat.constants)


def test_numbers_are_printed_with_units():
    assert amount(3 * 2**40, "bytes") == "3 TiB" and amount(512, "bytes") == "512 bytes"
    assert amount(7200, "core seconds") == "2 core hours" and amount(12, "requests") == "12 requests"
    assert count(1_230_000) == "1.23 million" and count(999) == "999" and count(0.25) == "0.25"


def test_constants_of_a_benchmark_replace_those_of_the_config_if_units_agree(local, tmp_path):
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
        ("constants.image_bytes.value=0", "greater than 0"),
    ],
)
def test_a_wrong_config_is_refused(override, message):
    with pytest.raises(AttribError, match=message):
        load_settings(ScaleSettings, CONFIG, [override])


def test_gpus_take_the_forward_pass_from_the_cores():
    on_cpus = settings_of()
    constants = on_cpus.constants.model_copy(
        update={"forward_images_per_gpu_second": on_cpus.constants.decode_images_per_second}
    )
    machines = on_cpus.machines | {"encoder": on_cpus.machines["encoder"].model_copy(update={"num_gpus": 4})}
    on_gpus = on_cpus.model_copy(update={"constants": constants, "machines": machines})
    embed = [
        next(w for w in describe_work(s, lay_out(s.target), "sources", 64) if w.name == "embed sources")
        for s in (on_cpus, on_gpus)
    ]
    assert embed[0].gpu_seconds == 0 < embed[1].gpu_seconds and embed[1].core_seconds < embed[0].core_seconds
    assert embed[1].moved_bytes == 3 * 224**2 * 10**9  # pixels between decoders and encoders


def test_tables_and_record_hold_every_stage_and_limit(local, tmp_path):
    settings = settings_of().model_copy(update={"output": str(tmp_path)})
    shown = run(settings)
    for text in ("1 billion sources", "embed sources", "write rows", "remedy: lower query_block_rows", "USD per month"):
        assert text in shown
    assert max(map(len, shown.splitlines())) < 180
    record = local.read_json(join(str(tmp_path), "scale.json"))
    planned = plan(settings)
    assert record["hours"] == planned.hours and record["cost"] == planned.cost
    assert all(stage["bound_by"] in stage["bounds"] for stage in record["stages"])
    assert [stage["work"]["name"] for stage in record["stages"]] == [s.work.name for s in planned.stages]
    assert len(record["breaks"]) == len(breaks(settings)) and record["settings"]["hardware"] == settings.hardware


def test_the_shipped_config_states_every_constant_and_no_other():
    given = yaml.safe_load(Path(CONFIG).read_text())["constants"]
    assert given.keys() | {"forward_images_per_gpu_second"} == Constants.model_fields.keys()
    assert all(field.title for field in Constants.model_fields.values())  # the unit
    with pytest.raises(AttribError, match="unknown key"):
        load_settings(ScaleSettings, CONFIG, ["constants.image_byte.value=1"])


def test_retired_keys_are_accepted_with_a_warning(caplog):
    overrides = ["measure=true", "simulation.num_raylets=[2]"]
    assert load_settings(ScaleSettings, CONFIG, overrides) == shipped()
    assert "simulation is no longer used" in caplog.text and "measure is no longer used" in caplog.text
    with pytest.raises(AttribError, match="unknown key"):
        load_settings(ScaleSettings, CONFIG, ["simulations=1"])
