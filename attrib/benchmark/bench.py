"""Where a benchmark keeps its inputs and its work, and the sets of vectors that its stages share."""

import os
from dataclasses import dataclass, replace
from functools import cached_property

from attrib.benchmark.harness import Contender, Row, compare, run_contender
from attrib.benchmark.photographs import source_images, web_jpegs
from attrib.benchmark.settings import BenchmarkSettings
from attrib.benchmark.vectors import VectorPlan, make_gaussian, make_vectors
from attrib.common.errors import AttribError
from attrib.common.settings import Settings
from attrib.common.storage import fresh_folder

MADE_BY = "jobs.benchmark"


@dataclass(frozen=True)
class VectorSet:
    """The first `size` vectors of a kind, and the paths of what is made of them."""

    kind: str  # "images" or "Gaussian"
    size: int
    folder: str
    vectors: str
    queries: str

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.size}".lower()

    def job(self, settings: BenchmarkSettings, **more) -> dict:
        """The keys that index_contenders and search_contenders share."""
        paths = {
            name: os.path.join(self.folder, file)
            for name, file in (
                ("template", "template.faiss"),
                ("shard", "shard"),
                ("faiss_index", "ivf.faiss"),
                ("truth", "truth.npy"),
                ("embeddings", "embeddings"),
                ("queries_folder", "asked"),
                ("float32", "float32"),
            )
        }
        wanted = settings.vectors
        return (
            paths
            | {
                "folder": self.folder,
                "name": self.name,
                "vectors": self.vectors,
                "queries": self.queries,
                "num_vectors": self.size,
                "top_k": wanted.top_k,
                "batches": list(wanted.batches),
                "recall_target": wanted.recall_target,
            }
            | more
        )


class Bench:
    """`<output>/inputs` is kept from run to run, `<output>/work` is not."""

    def __init__(self, settings: BenchmarkSettings):
        """Raises AttribError if the output folder holds what is not ours."""
        self.settings = settings
        marker = os.path.join(settings.output, f".{MADE_BY}")
        if os.path.isdir(settings.output) and os.listdir(settings.output) and not os.path.exists(marker):
            raise AttribError(
                f"{settings.output} holds something that {MADE_BY} did not make; choose another output folder"
            )
        self.inputs = os.path.join(settings.output, "inputs")
        os.makedirs(self.inputs, exist_ok=True)
        with open(marker, "w", encoding="utf-8") as file:
            file.write(f"Made by {MADE_BY}, which deletes work/ when it runs again.\n")
        self.work = fresh_folder(os.path.join(settings.output, "work"), MADE_BY)
        self.rows: list[Row] = []

    @property
    def num_cpus(self) -> int:
        return self.settings.vectors.threads[-1]

    @cached_property
    def images(self) -> list[str]:
        return source_images(self.settings, self.inputs)

    @cached_property
    def jpegs(self) -> str:
        return web_jpegs(self.images, self.settings.images, self.inputs, self.num_cpus)

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
        folder = os.path.join(self.inputs, f"vectors-{plan.digest}")
        make_vectors(plan, folder, self.num_cpus)
        sets = [self._vector_set("images", size, folder) for size in wanted.sizes]
        if wanted.gaussian_size:
            shape = (wanted.gaussian_size, wanted.batches[-1], wanted.dimension)
            folder = os.path.join(self.inputs, "gaussian-{}-{}-{}".format(*shape))
            make_gaussian(folder, *shape)
            sets.append(self._vector_set("Gaussian", wanted.gaussian_size, folder))
        return sets

    def _vector_set(self, kind: str, size: int, folder: str) -> VectorSet:
        made = VectorSet(kind, size, "", os.path.join(folder, "vectors.npy"), os.path.join(folder, "queries.npy"))
        made = replace(made, folder=os.path.join(self.work, made.name))
        os.makedirs(made.folder, exist_ok=True)
        return made

    @property
    def largest(self) -> VectorSet:
        return next(v for v in reversed(self.vector_sets) if v.kind == "images")

    def prepare(self, what: str, function: str, job: dict) -> dict:
        """What a contender's function finds, run once on all cores; its time is no row."""
        return run_contender(Contender(what, function, job, threads=self.num_cpus))["found"]

    def compare(self, stage: str, sizes: dict[str, str], contenders: list[Contender], num_rounds: int | None = None):
        rows = compare(stage, sizes, contenders, num_rounds or self.settings.num_rounds)
        self.rows += rows
        return rows


def as_json(settings: Settings) -> dict:
    return settings.model_dump(mode="json")
