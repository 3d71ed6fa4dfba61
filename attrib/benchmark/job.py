"""jobs.benchmark: decoding, encoding, index building and search compared with other libraries.

<output>/inputs/          images and vectors, kept between runs
<output>/work/            indexes of this run
<output>/benchmark.json   rows, constants, facts (machine), settings, versions; written after every stage
"""

import logging
import os
import time
from dataclasses import dataclass
from functools import cached_property

from attrib.benchmark import autofaiss_build, images, index_build, search
from attrib.benchmark.harness import Contender, Row, compare, format_table, run_contender
from attrib.benchmark.machine import describe, machine
from attrib.benchmark.settings import BenchmarkSettings
from attrib.benchmark.vectors import VectorPlan, make_gaussian, make_vectors
from attrib.common.config import versions
from attrib.common.errors import AttribError
from attrib.common.storage import Storage, fresh_folder, join

logger = logging.getLogger(__name__)

MADE_BY = "jobs.benchmark"
COMMAND = "python -m jobs.benchmark --config configs/benchmark.yaml"
ENCODE_SECONDS = 8.0  # duration of the timed loops of the stage embed
OURS_DECODE, OURS_BUILD, OURS_SEARCH = (f"attrib.{name}" for name in ("data.decoding", "index.shard", "index.search"))


@dataclass(frozen=True)
class VectorSet:
    """The first `size` vectors of a kind, and the paths of what is built from them."""

    kind: str  # "images" or "Gaussian"
    size: int
    dimension: int
    source: str  # folder of vectors.npy and queries.npy
    folder: str

    @property
    def label(self) -> str:
        return f"{self.size:,} x {self.dimension} ({self.kind})"

    def job(self, settings: BenchmarkSettings, **more) -> dict:
        """The keys that contenders of index_build and search share."""
        files = {"template": "template.faiss", "shard": "shard", "output": "shard", "faiss_index": "ivf.faiss"}
        files |= {"truth": "truth.npy", "embeddings": "embeddings", "float32": "float32"}
        paths = {name: os.path.join(self.folder, file) for name, file in files.items()}
        paths |= {name: os.path.join(self.source, f"{name}.npy") for name in ("vectors", "queries")}
        names = {"folder": self.folder, "name": os.path.basename(self.folder), "num_vectors": self.size}
        wanted = settings.vectors
        names |= {"top_k": wanted.top_k, "batches": list(wanted.batches), "recall_target": wanted.recall_target}
        return paths | names | more


class Bench:
    """Inputs, work folder and rows of one run."""

    def __init__(self, settings: BenchmarkSettings):
        """Raises AttribError if the output folder holds files of something else."""
        self.settings = settings
        marker = os.path.join(settings.output, f".{MADE_BY}")
        if os.path.isdir(settings.output) and os.listdir(settings.output) and not os.path.exists(marker):
            raise AttribError(
                f"{settings.output} holds files that {MADE_BY} did not make; choose another output folder"
            )
        self.inputs = os.path.join(settings.output, "inputs")
        os.makedirs(self.inputs, exist_ok=True)
        with open(marker, "w", encoding="utf-8") as file:
            file.write(f"Made by {MADE_BY}, which deletes work/ when it runs again.\n")
        self.work = fresh_folder(os.path.join(settings.output, "work"), MADE_BY)
        self.rows: list[Row] = []
        self.num_cpus = settings.vectors.threads[-1]

    @cached_property
    def images(self) -> list[str]:
        return images.source_images(self.settings, self.inputs)

    @cached_property
    def jpegs(self) -> str:
        return images.web_jpegs(self.images, self.settings.images, self.inputs, self.num_cpus)

    @cached_property
    def vector_sets(self) -> list[VectorSet]:
        wanted = self.settings.vectors
        plan = VectorPlan(
            images=self.images,
            backbone=self.settings.backbone.model_dump(mode="json"),
            dimension=wanted.dimension,
            map_px=wanted.map_px,
            versions_per_image=wanted.versions_per_image,
            num_vectors=wanted.sizes[-1],
            num_queries=wanted.batches[-1],
        )
        source = os.path.join(self.inputs, f"vectors-{plan.digest}")
        make_vectors(plan, source, self.num_cpus)
        sets = [self._vector_set("images", size, source) for size in wanted.sizes]
        if wanted.gaussian_size:
            shape = (wanted.gaussian_size, wanted.batches[-1], wanted.dimension)
            source = os.path.join(self.inputs, "gaussian-{}-{}-{}".format(*shape))
            make_gaussian(source, *shape)
            sets.append(self._vector_set("Gaussian", wanted.gaussian_size, source))
        return sets

    def _vector_set(self, kind: str, size: int, source: str) -> VectorSet:
        folder = os.path.join(self.work, f"{kind}-{size}".lower())
        os.makedirs(folder, exist_ok=True)
        return VectorSet(kind, size, self.settings.vectors.dimension, source, folder)

    def prepare(self, what: str, function, job: dict) -> dict:
        """Run a function once on all cores and return what it found; it makes no row."""
        return run_contender(Contender(what, function, job, threads=self.num_cpus))["found"]

    def compare(self, stage: str, sizes: dict[str, str], contenders: list[Contender], num_rounds: int | None = None):
        rows = compare(stage, sizes, contenders, num_rounds or self.settings.num_rounds)
        self.rows += rows
        return rows


def run(settings: BenchmarkSettings) -> dict:
    """Measure the stages of `settings.only`, write benchmark.json, and return it with the printed table."""
    bench, minutes, result = Bench(settings), {}, {}
    for name, stage in {"decode": decode, "embed": embed, "build": build, "search": search_stage}.items():
        if name not in settings.only:
            continue
        started = time.monotonic()
        stage(bench)
        minutes[name] = (time.monotonic() - started) / 60
        logger.info(f"benchmark: {name} took {minutes[name]:.1f} minutes")
        result = {
            "rows": [row.to_dict() for row in bench.rows],
            "constants": constants(bench.rows),
            "minutes": minutes,
            "num_cpus": os.cpu_count(),
            "facts": [{"what": name, "value": value, "note": ""} for name, value in machine().items()],
            "settings": settings.model_dump(mode="json"),
            "versions": versions(),
        }
        Storage(settings.storage).write_json(join(settings.output, "benchmark.json"), result)
    return result | {"table": f"{format_table(bench.rows)}\n\n{describe(machine())}"}


def decode(bench: Bench) -> list[Row]:
    wanted = bench.settings.images
    job = {"folder": bench.jpegs, "num_images": wanted.decode_images}
    job |= {"backbone": bench.settings.backbone.model_dump(mode="json")}
    contenders = [
        Contender(OURS_DECODE, images.decode_and_resize, job, note="default JPEG scaling of the embed job"),
        Contender(f"{OURS_DECODE}, full size", images.decode_and_resize, job | {"full_size": True}),
        Contender("Pillow loop", images.pillow, job),
    ]
    size = f"a JPEG of {wanted.min_megapixels:g} to {wanted.max_megapixels:g} megapixels"
    return bench.compare("decode + resize", {"image": size}, contenders)


def embed(bench: Bench) -> list[Row]:
    settings, wanted = bench.settings, bench.settings.images
    workers = settings.num_workers
    job = {"folder": bench.jpegs, "num_images": wanted.num_images, "workers": workers, "seconds": ENCODE_SECONDS}
    batch_size = min(16, max(1, wanted.loader_images // 4))  # the first batches are a warm-up and not timed
    job |= {"backbone": settings.backbone.model_dump(mode="json"), "loader_batch_size": batch_size}
    loaders = [
        Contender(
            f"DataLoader script, {count} loader(s)",
            images.data_loader,
            job | {"loaders": count, "num_images": min(wanted.loader_images, wanted.num_images)},
            threads=workers - count,
            note=f"{workers} threads in all; PIL, torchvision",
        )
        for count in range(workers)
    ]
    contenders = [
        Contender("attrib, decode + encode", images.encode_files, job, workers=workers, note="without Ray"),
        Contender("network alone", images.bare_encoder, job, workers=workers, note="prepared pixels: the upper limit"),
        *loaders,
    ]
    return bench.compare("embed", {"image": f"an image, {workers} threads"}, contenders)


def build(bench: Bench) -> list[Row]:
    """Train and fill on all cores, then fill alone on one thread with a trained quantizer."""
    rows = []
    for vectors in bench.vector_sets:
        rows += _train_and_build(bench, vectors) + _fill(bench, vectors)
    return rows


def _train_and_build(bench: Bench, vectors: VectorSet) -> list[Row]:
    wanted, job, threads = bench.settings.vectors, vectors.job(bench.settings), bench.num_cpus
    use_autofaiss = wanted.autofaiss and vectors.kind == "images"
    bench.prepare("embeddings", index_build.prepare, job | ({} if use_autofaiss else {"float32": None}))
    note = "10 iterations of k-means, attrib 20; one index in memory"
    contenders = [
        Contender("attrib", index_build.train_and_build, job, threads),
        Contender("faiss.index_factory", index_build.faiss_train_and_build, job, threads, note=note),
    ]
    if use_autofaiss:
        contenders.append(_autofaiss(bench, vectors, job))
    laps = {lap: f"{lap}: {vectors.label}, all cores" for lap in ("train and build", "train", "build")}
    is_slow = vectors.size == wanted.sizes[-1] or vectors.kind != "images"
    return bench.compare("build", laps, contenders, wanted.slow_rounds if is_slow else None)


def _autofaiss(bench: Bench, vectors: VectorSet, job: dict) -> Contender:
    folder = bench.settings.vectors.autofaiss_folder or os.path.join(bench.inputs, "autofaiss")
    plan, _ = index_build.ivf_plan(vectors.size, vectors.dimension)
    job = job | {"num_lists": plan.num_lists, "threads": bench.num_cpus, "output": vectors.folder}
    return Contender(
        "autofaiss",
        autofaiss_build.train_and_build,
        job | {"memory": "8G", "index_memory": "6G"},
        bench.num_cpus,
        note=f"IVF{plan.num_lists},Flat from float32 .npy; chooses its own training rows",
        python=autofaiss_build.environment_python(folder),
        may_fail=True,
        unavailable=autofaiss_build.missing(folder),
    )


def _fill(bench: Bench, vectors: VectorSet) -> list[Row]:
    job = vectors.job(bench.settings)
    in_memory = "same centroids; vectors in memory, no files"
    contenders = [
        Contender(OURS_BUILD, index_build.build, job),
        Contender("faiss, Parquet to index file", index_build.faiss_build, job, note="same centroids"),
        Contender("faiss index.add", index_build.faiss_add, job, note=in_memory),
    ]
    return bench.compare("build", {"build": f"one shard, one thread: {vectors.label}"}, contenders)


def search_stage(bench: Bench) -> list[Row]:
    wanted, rows = bench.settings.vectors, []
    for vectors in bench.vector_sets:
        if "build" not in bench.settings.only:
            job = vectors.job(bench.settings, float32=None)
            bench.prepare("embeddings", index_build.prepare, job)
            bench.prepare("our shard", index_build.train_and_build, job)
            bench.prepare("FAISS index", index_build.faiss_build, job)
        job = vectors.job(bench.settings, timed_queries=min(wanted.slow_peer_queries, wanted.batches[-1]))
        found = bench.prepare("exact neighbours", search.prepare, job)
        more = [nprobe for nprobe in wanted.more_nprobes if found["nprobe"] < nprobe < found["num_lists"]]
        for nprobe in (found["nprobe"], *more):
            # Noise is slow for all contenders, so it is measured with one number of threads.
            for threads in wanted.threads if vectors.kind == "images" else wanted.threads[:1]:
                rows += _search(bench, vectors, job | {"nprobe": nprobe}, threads, found["num_lists"])
    return rows


def _search(bench: Bench, vectors: VectorSet, job: dict, threads: int, num_lists: int) -> list[Row]:
    whole = {name: value for name, value in job.items() if name != "timed_queries"}
    # index.search is linear in the queries; on noise, where nprobe is nearly all lists, a whole batch takes too long.
    theirs = whole if vectors.kind == "images" else job
    argsort = job | {"timed_queries": bench.settings.vectors.argsort_queries}
    note = "same lists and nprobe"
    contenders = [
        Contender(OURS_SEARCH, search.batch_search, whole, threads),
        Contender("faiss index.search", search.faiss_search, theirs, threads, note=note),
        Contender("faiss.contrib big_batch_search", search.faiss_big_batch, whole, threads, note=note),
        Contender("argsort per query (AbC)", search.argsort_loop, argsort, threads),
    ]
    lists = f"nprobe {job['nprobe']} of {num_lists:,}"
    sizes = {
        str(batch): f"{batch:,} queries, {vectors.label}, {lists}, {threads} thread(s)" for batch in job["batches"]
    }
    return bench.compare("search", sizes, contenders)


def constants(rows: list[Row]) -> dict[str, dict]:
    """{name: {value, unit, command}}; jobs.scale reads those whose names it knows (attrib/capacity/settings.py)."""
    found: dict[str, dict] = {}

    def note(names: str, unit: str, stages: str, contender: str, size: str, value) -> None:
        # Values are per core, so searches on several threads do not count.
        mine = (r for r in rows if r.contender == contender and size in r.size and r.seconds is not None)
        measured = [r for r in mine if r.stage != "search" or r.threads == 1]
        if measured:
            command = f"{COMMAND} --set 'only=[{stages}]'"
            for name in names.split():
                found[name] = {"value": value(measured[-1]), "unit": unit, "command": command}

    decoded = "decode_images_per_second decode_images_per_second_per_core"
    note(decoded, "images/s", "decode", OURS_DECODE, "a JPEG", lambda row: 1 / row.seconds)
    forward = "forward_images_per_core_second forward_images_per_second_per_core"
    note(forward, "images/s", "embed", "network alone", "", lambda row: 1 / row.seconds / row.workers)
    kind = "(images)"
    note("index_bytes_per_vector", "bytes", "build", "attrib", kind, lambda row: row.found["bytes_per_vector"])
    embedding = "embedding_bytes_per_image"
    note(embedding, "bytes", "build", "attrib", kind, lambda row: row.found["embedding_bytes_per_vector"])
    note("build_seconds_largest_shard", "s", "build", OURS_BUILD, kind, lambda row: row.seconds)
    note("search_seconds_largest_batch", "s", "build, search", OURS_SEARCH, kind, lambda row: row.seconds)
    return found
