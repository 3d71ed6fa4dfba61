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
from attrib.benchmark.harness import Contender, compare, format_table, run_contender
from attrib.benchmark.machine import describe, machine
from attrib.benchmark.settings import STAGES, BenchmarkSettings
from attrib.benchmark.vectors import make_gaussian, make_vectors
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
    """The first `size` vectors of a kind. job: the keys that contenders of index_build and search share."""

    kind: str  # "images" or "Gaussian"
    size: int
    label: str
    job: dict


class Bench:
    """Inputs, work folder, stages and rows of one run."""

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
        self.rows: list[dict] = []
        self.num_cpus = settings.vectors.threads[-1]
        self.backbone = settings.backbone.model_dump(mode="json")

    @cached_property
    def images(self) -> list[str]:
        return images.source_images(self.settings, self.inputs)

    @cached_property
    def jpegs(self) -> str:
        return images.web_jpegs(self.images, self.settings.images, self.inputs, self.num_cpus)

    @cached_property
    def vector_sets(self) -> list[VectorSet]:
        wanted = self.settings.vectors
        source = make_vectors(self.images, self.settings.backbone, wanted, self.inputs, self.num_cpus)
        sets = [self._vector_set("images", size, source) for size in wanted.sizes]
        if wanted.gaussian_size:
            sets.append(self._vector_set("Gaussian", wanted.gaussian_size, make_gaussian(wanted, self.inputs)))
        return sets

    def _vector_set(self, kind: str, size: int, source: str) -> VectorSet:
        wanted, name = self.settings.vectors, f"{kind}-{size}".lower()
        folder = os.path.join(self.work, name)
        os.makedirs(folder, exist_ok=True)
        files = {"template": "template.faiss", "shard": "shard", "output": "shard", "faiss_index": "ivf.faiss"}
        files |= {"truth": "truth.npy", "embeddings": "embeddings"}
        job = {key: os.path.join(folder, file) for key, file in files.items()}
        job |= {key: os.path.join(source, f"{key}.npy") for key in ("vectors", "queries")}
        job |= {"folder": folder, "name": name, "num_vectors": size, "float32": None}
        job |= {"top_k": wanted.top_k, "batches": list(wanted.batches), "recall_target": wanted.recall_target}
        return VectorSet(kind, size, f"{size:,} x {wanted.dimension} ({kind})", job)

    def prepare(self, what: str, function, job: dict) -> dict:
        """Run a function once on all cores and return what it found; it makes no row."""
        return run_contender(Contender(what, function, job, threads=self.num_cpus))["found"]

    def compare(self, stage: str, sizes: dict[str, str], contenders: list[Contender], num_rounds: int | None = None):
        self.rows += compare(stage, sizes, contenders, num_rounds or self.settings.num_rounds)

    def decode(self) -> None:
        wanted = self.settings.images
        job = {"folder": self.jpegs, "num_images": wanted.decode_images, "backbone": self.backbone}
        contenders = [
            Contender(OURS_DECODE, images.decode_and_resize, job, note="default JPEG scaling of the embed job"),
            Contender(f"{OURS_DECODE}, full size", images.decode_and_resize, job | {"full_size": True}),
            Contender("Pillow loop", images.pillow, job),
        ]
        size = f"a JPEG of {wanted.min_megapixels:g} to {wanted.max_megapixels:g} megapixels"
        self.compare("decode + resize", {"image": size}, contenders)

    def embed(self) -> None:
        wanted, workers = self.settings.images, self.settings.num_workers
        job = {"folder": self.jpegs, "num_images": wanted.num_images, "backbone": self.backbone}
        ours = job | {"workers": workers, "seconds": ENCODE_SECONDS}
        theirs = job | {"num_images": min(wanted.loader_images, wanted.num_images)}
        theirs |= {"loader_batch_size": min(16, max(1, wanted.loader_images // 4))}  # the first batches are a warm-up
        upper = "prepared pixels: the upper limit"
        note = f"{workers} threads in all; PIL, torchvision"
        contenders = [
            Contender("attrib, decode + encode", images.encode_files, ours, workers=workers, note="without Ray"),
            Contender("network alone", images.bare_encoder, ours, workers=workers, note=upper),
        ]
        for loaders in range(workers):
            name, job, threads = (
                f"DataLoader script, {loaders} loader(s)",
                theirs | {"loaders": loaders},
                workers - loaders,
            )
            contenders.append(Contender(name, images.data_loader, job, threads, note=note))
        self.compare("embed", {"image": f"an image, {workers} threads"}, contenders)

    def build(self) -> None:
        """Train and fill on all cores, then fill alone on one thread with a trained quantizer."""
        for vectors in self.vector_sets:
            self._train_and_build(vectors)
            job, same, in_memory = vectors.job, "same centroids", "same centroids; vectors in memory, no files"
            contenders = [
                Contender(OURS_BUILD, index_build.build, job),
                Contender("faiss, Parquet to index file", index_build.faiss_build, job, note=same),
                Contender("faiss index.add", index_build.faiss_add, job, note=in_memory),
            ]
            self.compare("build", {"build": f"one shard, one thread: {vectors.label}"}, contenders)

    def _train_and_build(self, vectors: VectorSet) -> None:
        wanted, job, threads = self.settings.vectors, vectors.job, self.num_cpus
        note = "10 iterations of k-means, attrib 20; one index in memory"
        contenders = [
            Contender("attrib", index_build.train_and_build, job, threads),
            Contender("faiss.index_factory", index_build.faiss_train_and_build, job, threads, note=note),
        ]
        is_slow = vectors.size == wanted.sizes[-1] or vectors.kind != "images"
        if wanted.autofaiss and vectors.kind == "images":
            job = job | {"float32": os.path.join(job["folder"], "float32")}
            contenders.append(self._autofaiss(vectors, job))
        self.prepare("embeddings", index_build.prepare, job)
        laps = {lap: f"{lap}: {vectors.label}, all cores" for lap in ("train and build", "train", "build")}
        self.compare("build", laps, contenders, wanted.slow_rounds if is_slow else None)

    def _autofaiss(self, vectors: VectorSet, job: dict) -> Contender:
        folder = self.settings.vectors.autofaiss_folder or os.path.join(self.inputs, "autofaiss")
        lists = index_build.ivf_plan(vectors.size, self.settings.vectors.dimension)[0].num_lists
        limits = {"memory": "8G", "index_memory": "6G", "threads": self.num_cpus}
        return Contender(
            "autofaiss",
            autofaiss_build.train_and_build,
            job | limits | {"num_lists": lists, "output": job["folder"]},
            self.num_cpus,
            note=f"IVF{lists},Flat from float32 .npy; chooses its own training rows",
            python=autofaiss_build.environment_python(folder),
            may_fail=True,
            unavailable=autofaiss_build.missing(folder),
        )

    def search(self) -> None:
        wanted = self.settings.vectors
        for vectors in self.vector_sets:
            if "build" not in self.settings.only:
                for function in (index_build.prepare, index_build.train_and_build, index_build.faiss_build):
                    self.prepare(f"index for the search ({function.__name__})", function, vectors.job)
            job = vectors.job | {"timed_queries": min(wanted.slow_peer_queries, wanted.batches[-1])}
            found = self.prepare("exact neighbours", search.prepare, job)
            more = [nprobe for nprobe in wanted.more_nprobes if found["nprobe"] < nprobe < found["num_lists"]]
            for nprobe in (found["nprobe"], *more):
                # Noise is slow for all contenders, so it is measured with one number of threads.
                for threads in wanted.threads if vectors.kind == "images" else wanted.threads[:1]:
                    lists = f"nprobe {nprobe} of {found['num_lists']:,}, {threads} thread(s)"
                    self._search(vectors, job | {"nprobe": nprobe}, threads, lists)

    def _search(self, vectors: VectorSet, job: dict, threads: int, lists: str) -> None:
        whole = {name: value for name, value in job.items() if name != "timed_queries"}
        # index.search is linear in the queries; on noise, where nprobe is nearly all lists, a batch takes too long.
        theirs = whole if vectors.kind == "images" else job
        argsort = job | {"timed_queries": self.settings.vectors.argsort_queries}
        note = "same lists and nprobe"
        contenders = [
            Contender(OURS_SEARCH, search.batch_search, whole, threads),
            Contender("faiss index.search", search.faiss_search, theirs, threads, note=note),
            Contender("faiss.contrib big_batch_search", search.faiss_big_batch, whole, threads, note=note),
            Contender("argsort per query (AbC)", search.argsort_loop, argsort, threads),
        ]
        sizes = {str(batch): f"{batch:,} queries, {vectors.label}, {lists}" for batch in job["batches"]}
        self.compare("search", sizes, contenders)


def run(settings: BenchmarkSettings) -> dict:
    """Measure the stages of `settings.only`, write benchmark.json, and return it with the printed table."""
    bench, minutes, result = Bench(settings), {}, {}
    for name in STAGES:
        if name not in settings.only:
            continue
        started = time.monotonic()
        getattr(bench, name)()
        minutes[name] = (time.monotonic() - started) / 60
        logger.info(f"benchmark: {name} took {minutes[name]:.1f} minutes")
        result = {
            "rows": bench.rows,
            "constants": constants(bench.rows),
            "minutes": minutes,
            "num_cpus": os.cpu_count(),
            "facts": [{"what": name, "value": value, "note": ""} for name, value in machine().items()],
            "settings": settings.model_dump(mode="json"),
            "versions": versions(),
        }
        Storage(settings.storage).write_json(join(settings.output, "benchmark.json"), result)
    return result | {"table": f"{format_table(bench.rows)}\n\n{describe(machine())}"}


def constants(rows: list[dict]) -> dict[str, dict]:
    """{name: {value, unit, command}}; jobs.scale reads those whose names it knows (attrib/capacity/settings.py)."""
    found: dict[str, dict] = {}

    def note(names: str, unit: str, stages: str, contender: str, size: str, value) -> None:
        # Values are per core, so searches on several threads do not count.
        mine = (row for row in rows if row["contender"] == contender and size in row["size"] and row["seconds"])
        measured = [row for row in mine if row["stage"] != "search" or row["threads"] == 1]
        if measured:
            command = f"{COMMAND} --set 'only=[{stages}]'"
            for name in names.split():
                found[name] = {"value": value(measured[-1]), "unit": unit, "command": command}

    decoded = "decode_images_per_second decode_images_per_second_per_core"
    note(decoded, "images/s", "decode", OURS_DECODE, "a JPEG", lambda row: 1 / row["seconds"])
    forward = "forward_images_per_core_second forward_images_per_second_per_core"
    note(forward, "images/s", "embed", "network alone", "", lambda row: 1 / row["seconds"] / row["workers"])
    kind, per_image = "(images)", "embedding_bytes_per_image"
    note("index_bytes_per_vector", "bytes", "build", "attrib", kind, lambda row: row["found"]["bytes_per_vector"])
    note(per_image, "bytes", "build", "attrib", kind, lambda row: row["found"]["embedding_bytes_per_vector"])
    note("build_seconds_largest_shard", "s", "build", OURS_BUILD, kind, lambda row: row["seconds"])
    note("search_seconds_largest_batch", "s", "build, search", OURS_SEARCH, kind, lambda row: row["seconds"])
    return found
