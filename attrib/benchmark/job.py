"""jobs.benchmark: decoding, encoding, index building and search compared with other libraries.

<output>/inputs/          images and vectors, kept between runs
<output>/work/            indexes of this run
<output>/benchmark.json   rows, constants, facts (machine), settings, versions; written after every stage
"""

import logging
import os
import platform
import re
import time
from functools import cached_property
from pathlib import Path

import psutil

from attrib.benchmark import autofaiss_build, images, index_build, search
from attrib.benchmark.harness import Contender, compare, format_table, run_contender
from attrib.benchmark.settings import STAGES, BenchmarkSettings
from attrib.benchmark.vectors import make_gaussian, make_vectors
from attrib.common.config import versions
from attrib.common.formats import gib
from attrib.common.outputs import check_output
from attrib.common.storage import Storage, fresh_folder, join

logger = logging.getLogger(__name__)

MADE_BY = "jobs.benchmark"
COMMAND = "python -m jobs.benchmark --config configs/benchmark.yaml"
ENCODE_SECONDS = 8.0  # duration of the timed loops of the stage embed
OURS_DECODE, OURS_BUILD, OURS_SEARCH = (f"attrib.{name}" for name in ("data.decoding", "index.shard", "index.search"))
NETWORK_ALONE = "network alone"


class Bench:
    """Inputs, work folder, stages and rows of one run."""

    def __init__(self, settings: BenchmarkSettings):
        """Raises AttribError if the output folder holds files of something else."""
        self.settings = settings
        check_output(settings, (f".{MADE_BY}",), Storage(settings.storage))
        fresh_folder(settings.output, MADE_BY, ("work",))
        self.inputs, self.work = (os.path.join(settings.output, name) for name in ("inputs", "work"))
        os.makedirs(self.inputs, exist_ok=True)
        os.makedirs(self.work)
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
    def vector_jobs(self) -> list[dict]:
        """Keys that contenders of index_build and search share, for each set of vectors."""
        wanted = self.settings.vectors
        source = make_vectors(self.images, self.settings.backbone, wanted, self.inputs, self.num_cpus)
        jobs = [self._vector_job("images", size, source) for size in wanted.sizes]
        if wanted.gaussian_size:
            jobs.append(self._vector_job("Gaussian", wanted.gaussian_size, make_gaussian(wanted, self.inputs)))
        return jobs

    def _vector_job(self, kind: str, size: int, source: str) -> dict:
        """The first `size` vectors of the folder `source`."""
        wanted, name = self.settings.vectors, f"{kind}-{size}".lower()
        folder = Path(self.work, name)
        folder.mkdir()
        files = ("manifest", "embeddings", "float32", "template", "shard", "faiss_index", "truth")
        job = {file: str(folder / file) for file in files} | {"folder": str(folder)}
        job |= {key: os.path.join(source, f"{key}.npy") for key in ("vectors", "queries")}
        job |= {"kind": kind, "name": name, "num_vectors": size, "label": f"{size:,} x {wanted.dimension} ({kind})"}
        job |= {"autofaiss": wanted.autofaiss and kind == "images" and "build" in self.settings.only}
        searched = {"top_k", "batches", "recall_target", "slow_peer_queries", "argsort_queries"}
        return job | wanted.model_dump(include=searched)

    def prepare(self, function, job: dict) -> dict:
        """Run a function once on all cores and return what it found; it makes no row."""
        name = f"preparation by {function.__module__}.{function.__name__}"
        return run_contender(Contender(name, function, job, threads=self.num_cpus))["found"]

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
        job |= {"workers": workers, "seconds": ENCODE_SECONDS}
        upper = "prepared pixels: the upper limit"
        contenders = [
            Contender("attrib, decode + encode", images.encode, job, workers=workers, note="without Ray"),
            Contender(NETWORK_ALONE, images.encode, job | {"prepared": True}, workers=workers, note=upper),
        ]
        note = f"{workers} threads in all; PIL, torchvision"
        for loaders in range(workers):
            theirs = job | {"num_images": wanted.loader_images, "loaders": loaders}
            name, threads = f"DataLoader script, {loaders} loader(s)", workers - loaders
            contenders.append(Contender(name, images.data_loader, theirs, threads, note=note))
        self.compare("embed", {"image": f"an image, {workers} threads"}, contenders)

    def build(self) -> None:
        """Train and fill on all cores, then fill alone on one thread with a trained quantizer."""
        for job in self.vector_jobs:
            self._train_and_build(job)
            same, in_memory = "same centroids", "same centroids; vectors in memory, no files"
            contenders = [
                Contender(OURS_BUILD, index_build.build, job),
                Contender("faiss, Parquet to index file", index_build.faiss_build, job, note=same),
                Contender("faiss index.add", index_build.faiss_add, job, note=in_memory),
            ]
            self.compare("build", {"build": f"one shard, one thread: {job['label']}"}, contenders)

    def _train_and_build(self, job: dict) -> None:
        wanted, threads = self.settings.vectors, self.num_cpus
        note = "10 iterations of k-means, attrib 20; one index in memory"
        contenders = [
            Contender("attrib", index_build.train_and_build, job, threads),
            Contender("faiss.index_factory", index_build.faiss_train_and_build, job, threads, note=note),
        ]
        is_slow = job["num_vectors"] == wanted.sizes[-1] or job["kind"] != "images"
        prepared = self.prepare(index_build.prepare, job)
        if job["autofaiss"]:
            contenders.append(self._autofaiss(job | prepared))
        laps = {lap: f"{lap}: {job['label']}, all cores" for lap in ("train and build", "train", "build")}
        self.compare("build", laps, contenders, wanted.slow_rounds if is_slow else None)

    def _autofaiss(self, job: dict) -> Contender:
        wanted, threads = self.settings.vectors, self.num_cpus
        note = f"IVF{job['num_lists']},Flat from float32 .npy; chooses its own training rows"
        python = os.path.join(wanted.autofaiss_folder or os.path.join(self.inputs, "autofaiss"), "bin", "python")
        function, job = autofaiss_build.train_and_build, job | {"threads": threads}
        return Contender("autofaiss", function, job, threads, note=note, python=python, may_fail=True)

    def search(self) -> None:
        wanted = self.settings.vectors
        for job in self.vector_jobs:
            if "build" not in self.settings.only:
                for function in (index_build.prepare, index_build.train_and_build, index_build.faiss_build):
                    self.prepare(function, job)
            found = self.prepare(search.prepare, job)
            more = [nprobe for nprobe in wanted.more_nprobes if found["nprobe"] < nprobe < found["num_lists"]]
            for nprobe in (found["nprobe"], *more):
                # Noise is slow for all contenders, so it is measured with one number of threads.
                for threads in wanted.threads if job["kind"] == "images" else wanted.threads[:1]:
                    lists = f"nprobe {nprobe} of {found['num_lists']:,}, {threads} thread(s)"
                    self._search(job | {"nprobe": nprobe}, threads, lists)

    def _search(self, job: dict, threads: int, lists: str) -> None:
        note = "same lists and nprobe"
        contenders = [
            Contender(OURS_SEARCH, search.batch_search, job, threads),
            Contender("faiss index.search", search.faiss_search, job, threads, note=note),
            Contender("faiss.contrib big_batch_search", search.faiss_big_batch, job, threads, note=note),
            Contender("argsort per query (AbC)", search.argsort_loop, job, threads),
        ]
        sizes = {str(batch): f"{batch:,} queries, {job['label']}, {lists}" for batch in job["batches"]}
        self.compare("search", sizes, contenders)


def run(settings: BenchmarkSettings) -> dict:
    """Measure the stages of `settings.only`, write benchmark.json, and return it with the printed table."""
    bench, minutes, result, facts = Bench(settings), {}, {}, machine()
    for name in (stage for stage in STAGES if stage in settings.only):
        started = time.monotonic()
        getattr(bench, name)()
        minutes[name] = (time.monotonic() - started) / 60
        logger.info(f"benchmark: {name} took {minutes[name]:.1f} minutes")
        result = {
            "rows": bench.rows,
            "constants": constants(bench.rows),
            "minutes": minutes,
            "num_cpus": os.cpu_count(),
            "facts": [{"what": name, "value": value, "note": ""} for name, value in facts.items()],
            "settings": settings.model_dump(mode="json"),
            "versions": versions(),
        }
        Storage(settings.storage).write_json(join(settings.output, "benchmark.json"), result)
    stamped = ", ".join(f"{name} {version}" for name, version in versions().items())
    table = f"{format_table(bench.rows)}\n\nmachine: {', '.join(facts.values())}\nversions: {stamped}"
    return result | {"table": table}


def machine() -> dict[str, str]:
    """Hardware and system, in words."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    return {
        "processor": model[1] if model else platform.machine(),
        "cores": f"{psutil.cpu_count(logical=False) or '?'} physical, {os.cpu_count()} logical",
        "memory": gib(psutil.virtual_memory().total),
        "system": platform.platform(),
    }


def _rate(row: dict) -> float:
    return 1 / row["seconds"] / row["workers"]


# Names, unit, stages that measure it, contender, and the value of its row.
CONSTANTS = (
    ("decode_images_per_second decode_images_per_second_per_core", "images/s", "decode", OURS_DECODE, _rate),
    ("forward_images_per_core_second forward_images_per_second_per_core", "images/s", "embed", NETWORK_ALONE, _rate),
    ("index_bytes_per_vector", "bytes", "build", "attrib", lambda row: row["found"]["bytes_per_vector"]),
    ("embedding_bytes_per_image", "bytes", "build", "attrib", lambda row: row["found"]["embedding_bytes_per_vector"]),
    ("build_seconds_largest_shard", "s", "build", OURS_BUILD, lambda row: row["seconds"]),
    ("search_seconds_largest_batch", "s", "build, search", OURS_SEARCH, lambda row: row["seconds"]),
)


def constants(rows: list[dict]) -> dict[str, dict]:
    """{name: {value, unit, command}}; jobs.scale reads those whose names it knows (attrib/capacity/settings.py)."""
    found = {}
    for row in rows:  # the last row of a contender is of the largest size
        # Values are per core, so searches on several threads do not count.
        if "Gaussian" in row["size"] or (row["stage"] == "search" and row["threads"] > 1):
            continue
        for names, unit, stages, contender, value in CONSTANTS:
            if row["contender"] == contender:
                command = f"{COMMAND} --set 'only=[{stages}]'"
                found |= {name: {"value": value(row), "unit": unit, "command": command} for name in names.split()}
    return found
