"""The constants of jobs.scale that this machine can measure by itself, in about a minute: the parts of the jobs on one thread, in CPU seconds.

What needs an object store, a GPU or the images of a user is left to the config and to jobs.benchmark.
"""

import json
import pickle
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa

from attrib.attribute.blocks import partial_table, wanted_table
from attrib.attribute.rows import RunStamp, attribution_rows
from attrib.capacity.layout import id_bytes
from attrib.capacity.settings import Constant
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage, join, scratch_folder
from attrib.data.chunks import plan_chunks
from attrib.data.collections import LOCATION_FIELDS, ListingUnit, list_images
from attrib.data.ids import image_ids
from attrib.data.job import _write_partition
from attrib.data.manifest import Manifest, Slice, ids_digest, part_name
from attrib.data.settings import CollectionSettings
from attrib.embed.assemble import _finish_partition
from attrib.embed.embeddings import Embeddings, schema
from attrib.embed.settings import EmbedSettings
from attrib.index.cost_model import SearchRates, measure_rates
from attrib.index.normalize import unit_rows
from attrib.index.planning import plan_index
from attrib.index.quantizer import train_quantizer
from attrib.index.search import Candidates, merge
from attrib.index.settings import IndexSettings
from attrib.index.shard import build_shard
from attrib.shares.settings import SharesSettings

DIMENSION = 256
PARTITION_ROWS = 16_384
NUM_PARTITIONS = 4
NUM_LISTS = 256
NUM_QUERIES = 2_000
TOP_K = 10
RATE_ROUNDS = 5
STAMP = RunStamp("0" * 16, "1" * 64, "2" * 64)
FIT_ROWS = (1, PARTITION_ROWS)  # of the two files that tell bytes per row from bytes per file


def measure_constants(command: str) -> dict[str, Constant]:
    """By name. command: what the user ran, for the constants' source."""
    faiss.omp_set_num_threads(1)
    values: dict[str, float] = {}
    with scratch_folder() as folder:
        storage = Storage(StorageSettings())
        values |= _file_sizes(folder, storage)
        values |= _collection_rates(folder, storage)
        values |= _index_rates(folder, storage)
    values |= _driver_sizes()
    return {name: Constant(value=float(f"{value:.4g}"), source=command) for name, value in values.items()}


def _cpu_seconds(work: Callable[[], object], at_least: float = 0.5) -> float:
    """CPU seconds of one call, all threads of the process together."""
    turns, started = 0, time.process_time()
    while time.process_time() - started < at_least:
        work()
        turns += 1
    return (time.process_time() - started) / turns


def _keys(num_rows: int) -> list[str]:
    return [f"{number // 10_000:06d}/{number:09d}.jpg" for number in range(num_rows)]


def _manifest_rows(num_rows: int) -> pa.Table:
    generator, keys = np.random.default_rng(0), _keys(num_rows)
    sizes = generator.integers(50_000, 400_000, num_rows)
    columns = {
        "id": image_ids("sources", keys),
        "key": keys,
        "uri": [f"s3://a-bucket/sources/{key[:6]}.tar" for key in keys],
        "offset": np.cumsum(sizes + 1024),
        "num_bytes": sizes,
    }
    arrays = [pa.array(columns.get(f.name, [None] * num_rows), f.type) for f in LOCATION_FIELDS]
    return pa.table(arrays, schema=pa.schema(LOCATION_FIELDS))


def _embedding_rows(ids: np.ndarray) -> pa.Table:
    generator, count = np.random.default_rng(0), len(ids)
    columns = {
        "id": ids,
        "content_sha256": [generator.bytes(32) for _ in range(count)],
        "width": generator.integers(400, 2000, count),
        "height": generator.integers(400, 2000, count),
        "format": ["jpeg"] * count,
    }
    kinds = schema(DIMENSION)
    arrays = [pa.array(columns.get(f.name, [None] * count), f.type) for f in list(kinds)[:-1]]
    vectors = generator.standard_normal((count, DIMENSION)).astype(np.float16)
    return pa.table([*arrays, pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIMENSION)], schema=kinds)


def _file_sizes(folder: str, storage: Storage) -> dict[str, float]:
    def sizes(num_rows: int) -> dict[str, int]:
        images = _manifest_rows(num_rows)
        ids = np.sort(images["id"].to_numpy())
        sources = images.select(["id", "key", "uri"]).sort_by("id").combine_chunks()
        queries = _query_rows(images)
        best = _best(ids, num_rows)
        attributions, outcomes = attribution_rows(best, queries, sources, TOP_K, SharesSettings(), STAMP)
        tables = {
            "manifest": images,
            "embedding": _embedding_rows(ids),
            "source": sources,
            "partial": partial_table(best, ids),
            "wanted": wanted_table(ids, np.arange(num_rows) * 100 // num_rows),
            "attribution": attributions,
            "outcome": outcomes,
        }
        found = {}
        for name, table in tables.items():
            uri = join(folder, f"{name}.parquet")
            storage.write_table(uri, table)
            found[name] = Path(uri).stat().st_size
        return found

    few, many = (sizes(num_rows) for num_rows in FIT_ROWS)
    values = {}
    for name in few:
        per_image = TOP_K if name in ("partial", "attribution") else 1
        values[f"{name}_file_bytes"] = float(few[name])
        values[f"{name}_row_bytes"] = (many[name] - few[name]) / (FIT_ROWS[1] - FIT_ROWS[0]) / per_image
    for of in ("file", "row"):  # the file of one row holds one vector
        values[f"embedding_{of}_bytes"] -= 2 * DIMENSION
    num_found = FIT_ROWS[1] * TOP_K
    values["partial_row_bytes"] -= (
        id_bytes(num_found, FIT_ROWS[1]) / num_found
    )  # their number is of the size, not of the row
    images = _manifest_rows(FIT_ROWS[1])
    queries, sources = _query_rows(images), images.select(["id", "key", "uri"]).sort_by("id").combine_chunks()
    best = _best(sources["id"].to_numpy(), FIT_ROWS[1])

    def write_rows() -> None:
        for table in attribution_rows(best, queries, sources, TOP_K, SharesSettings(), STAMP):
            storage.write_table(join(folder, "rows.parquet"), table)

    values["attribution_rows_per_second"] = len(best.query) / _cpu_seconds(write_rows)
    return values


def _query_rows(images: pa.Table) -> pa.Table:
    """As attrib.attribute.rows.block_queries makes them."""
    queries = images.select(["id", "key", "uri"]).sort_by("id").combine_chunks()
    for name in ("stage", "reason"):
        queries = queries.append_column(name, pa.nulls(len(images), pa.string()))
    return queries


def _best(ids: np.ndarray, num_queries: int) -> Candidates:
    generator = np.random.default_rng(1)
    # So near to one another that every one has a share: shares of zero would compress.
    score = 0.95 - 0.05 * np.sort(generator.random((num_queries, TOP_K)).astype(np.float32), axis=1).ravel()
    query = np.repeat(np.arange(num_queries), TOP_K)
    return Candidates(query, generator.choice(ids, len(query)), score + np.float32(1e-7), score)


def _collection_rates(folder: str, storage: Storage) -> dict[str, float]:
    tar_path = join(folder, "images.tar")
    with tarfile.open(tar_path, "w") as tar:
        for key in _keys(2_000):
            member = tarfile.TarInfo(key)
            member.size = 1_024
            tar.addfile(member, BytesIO(bytes(member.size)))
    collection = CollectionSettings(name="sources", uri=tar_path, format="webdataset")
    listing = _cpu_seconds(lambda: list_images(ListingUnit(tar_path), collection, storage)) / 2_000
    images = _manifest_rows(PARTITION_ROWS)
    storage.write_table(join(folder, "unit.parquet"), images)
    part_uri = join(folder, "manifest", part_name(0))
    slices = [Slice(0, 0, PARTITION_ROWS)]
    numbering = _cpu_seconds(
        lambda: _write_partition([join(folder, "unit.parquet")], slices, {}, collection, part_uri, storage)
    )
    manifest = Manifest(join(folder, "manifest"), collection, "", "", "", [PARTITION_ROWS], [])
    job = EmbedSettings(manifest=manifest.uri, output=join(folder, "assembled"), backbone={"name": "test_vit"})
    rows = _embedding_rows(images["id"].to_numpy())
    for chunk in plan_chunks(PARTITION_ROWS, 0, job.chunk_rows):
        storage.write_table(chunk.uri(job.output), rows.slice(chunk.start, chunk.stop - chunk.start))

    def assemble() -> None:
        _finish_partition(job, manifest, 0, storage)
        storage.delete_file(join(job.output, part_name(0)))

    return {
        "list_images_per_second": 1 / listing,
        "manifest_rows_per_second": PARTITION_ROWS / numbering,
        "assemble_rows_per_second": PARTITION_ROWS / _cpu_seconds(assemble),
    }


def _index_rates(folder: str, storage: Storage) -> dict[str, float]:
    num_vectors = NUM_PARTITIONS * PARTITION_ROWS
    images = _manifest_rows(num_vectors)
    for part in range(NUM_PARTITIONS):
        ids = np.sort(images["id"].to_numpy()[part * PARTITION_ROWS : (part + 1) * PARTITION_ROWS])
        storage.write_table(join(folder, "embeddings", part_name(part)), _embedding_rows(ids))
    sizes = [PARTITION_ROWS] * NUM_PARTITIONS
    embeddings = Embeddings(join(folder, "embeddings"), "", {"dimension": DIMENSION}, "", sizes, sizes)
    generator = np.random.default_rng(2)
    block = unit_rows(generator.standard_normal((4_096, DIMENSION)))
    gemm = 2.0 * len(block) ** 2 * DIMENSION / _cpu_seconds(lambda: block @ block.T)
    settings = IndexSettings(embeddings="/", output="/", kind="ivf_flat", num_lists=NUM_LISTS)
    plan = plan_index(settings, num_vectors, [num_vectors], DIMENSION)
    training = unit_rows(generator.standard_normal((40 * NUM_LISTS, DIMENSION)))
    template = train_quantizer(training, plan, seed=0)
    sources = images.select(["id", "key", "uri"]).sort_by("id").combine_chunks()
    partitions, shard_uri = list(range(NUM_PARTITIONS)), join(folder, "shard")
    building = _cpu_seconds(
        lambda: build_shard(shard_uri, embeddings, partitions, template, sources, storage), at_least=0.1
    )
    assignment = 2.0 * num_vectors * NUM_LISTS * DIMENSION / gemm
    # By the clock, which a busy machine disturbs: of several the quickest.
    measured = [measure_rates(DIMENSION).to_dict() for _ in range(RATE_ROUNDS)]
    rates = SearchRates(**{name: min(rate[name] for rate in measured) for name in measured[0]})
    query = np.repeat(np.arange(NUM_QUERIES), TOP_K)
    parts = [
        Candidates(query, generator.integers(0, 2**62, len(query)), score, score)
        for score in generator.random((4, len(query)), np.float32)
    ]
    merging = _cpu_seconds(lambda: merge(parts, TOP_K))
    wanted = pa.array(np.sort(generator.choice(sources["id"].to_numpy(), NUM_QUERIES)))
    scanned = [join(shard_uri, "sources.parquet")]
    looking = _cpu_seconds(
        lambda: storage.dataset(scanned, format="parquet").to_table(filter=pa.compute.field("id").isin(wanted))
    )
    return {
        "gemm_gflops": gemm / 1e9,
        "list_visit_seconds": rates.per_list,
        "value_seconds": rates.per_value,
        "list_product_seconds": rates.per_list_product,
        "block_product_seconds": rates.per_block_product,
        "build_vectors_per_second": num_vectors / max(building - assignment, building / 10),
        "merge_rows_per_second": len(parts) * len(query) / merging,
        "sources_rows_per_second": num_vectors / looking,
    }


def _driver_sizes() -> dict[str, float]:
    num_images = 1_000_000
    collection = CollectionSettings(name="sources", uri="/")
    listed = np.random.default_rng(0).integers(0, 2**62, (100, num_images // 100))

    def settle() -> None:  # as attrib.data.job.run does
        sorted_ids = np.sort(np.concatenate(list(listed)))
        sorted_ids = np.union1d(sorted_ids, np.empty(0, np.int64))
        ids_digest(collection, sorted_ids)

    def pending() -> list:  # as attrib.embed.job does
        chunks = plan_chunks(num_images, 0, 100)
        return [chunks, [{"partition": c.partition, "start": c.start, "stop": c.stop} for c in chunks]]

    uris = [f"s3://a-bucket/output/manifest/_listings/unit-{number:06d}.parquet" for number in range(100_000)]
    sizes = [PARTITION_ROWS] * 100_000
    failures = _manifest_rows(1_000).select(["id", "key", "uri"])
    for name, said in (("stage", "decode"), ("reason", "the image is truncated")):
        failures = failures.append_column(name, pa.array([said] * len(failures)))
    files = {f"{name}.npy": {"sha256": f"{name:064d}", "num_bytes": 10**9} for name in range(4)}
    shards = [{"num_vectors": 999_424, "partitions": list(range(61)), "files": files} for _ in range(1_000)]
    shards = json.loads(json.dumps(shards))  # pickle writes an object that occurs twice only once
    return {
        "driver_bytes_per_image": 8 + _peak_bytes(settle) / num_images,  # and the listings' ids, 8 bytes each, besides
        "driver_bytes_per_chunk": _peak_bytes(pending) / (num_images / 100),
        # Key and URI with their offsets, stage and reason, joined once more.
        "driver_bytes_per_failure": 2.0 * failures.nbytes / len(failures),
        "argument_bytes_per_unit": len(pickle.dumps(uris)) / len(uris),
        "argument_bytes_per_partition": len(pickle.dumps(sizes)) / len(sizes),
        "argument_bytes_per_shard": len(pickle.dumps(shards)) / len(shards),
        "pickle_bytes_per_second": len(pickle.dumps(uris)) / _cpu_seconds(lambda: pickle.dumps(uris)),
    }


def _peak_bytes(work: Callable[[], object]) -> int:
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak
