"""The ablation job: variants as Ray tasks, end-to-end variants by the train job, and one table and page of all.

<output>/evaluation.json, table.txt, queries.parquet, comparison.html   as written by jobs.evaluate, for all variants
<output>/ablation.json       settings; criterion by epoch of every variant; theory (canonical correlations)
<output>/theory.svg          canonical correlations, alignment and whiteness
<output>/vectors/NAME.npz    source_files, sources, query_files, queries: the input of score.py and other tools
<output>/_features/, _variants/   finished work, by digest of its inputs and settings, which a later run does not repeat
"""

import logging
from dataclasses import dataclass

import pyarrow as pa

from attrib.common.config import digest, versions
from attrib.common.run_record import rewriting
from attrib.common.storage import Storage, join
from attrib.data.job import list_collection
from attrib.data.manifest import Manifest
from attrib.embed import job as embed_job
from attrib.embed.settings import EmbedSettings
from attrib.evaluate import cca
from attrib.evaluate.ablation.results import read_result, write_result, write_vectors
from attrib.evaluate.ablation.settings import CHOSEN, AblateSettings, VariantSettings
from attrib.evaluate.ablation.variants import AblationFeatures, VariantResult, chosen_by_folds, score, score_variant
from attrib.evaluate.collection import Collection, read_collection
from attrib.evaluate.page import ImageFolders, write_comparison
from attrib.evaluate.pair_measures import THEORY_CAPTION, pair_theory
from attrib.evaluate.protocol import TruthRow, places_of, read_truth
from attrib.evaluate.scores import format_table
from attrib.models.encoder import load_network
from attrib.models.model import model_digest
from attrib.runtime.session import connect, put
from attrib.runtime.tasks import run_units
from attrib.train import job as train_job
from attrib.train.feature_tasks import view_features
from attrib.train.settings import TrainSettings

logger = logging.getLogger(__name__)

RECORD = "ablation.json"
DOMAINS = {"sources": "real", "generated": "synthetic"}


@dataclass(frozen=True)
class _Run:
    """Inputs of a run. manifests, keys: of "sources" and "generated"; inputs: digests of all that is read."""

    settings: AblateSettings
    storage: Storage
    manifests: dict[str, Manifest]
    keys: dict[str, Collection]  # vectors: int64 [n, 1], ids
    truth: list[TruthRow]
    inputs: dict[str, str]

    def folder(self, variant: VariantSettings) -> str:
        """Folder of a variant's results, named by a digest of all that determines them."""
        settings = self.settings
        trained = settings.training(variant, "/", "/")
        decides = trained.model_dump(mode="json", exclude={"storage", "ray", "num_workers"})
        used = digest(
            [self.inputs, decides, variant.learns_from, variant.kinds, settings.truth.model_dump(), settings.num_folds]
        )
        return join(settings.output, "_variants", f"{variant.file_name}-{used[:12]}")

    def training(self, variant: VariantSettings) -> TrainSettings:
        return self.settings.training(variant, self.manifests["sources"].uri, self.folder(variant))


def run(settings: AblateSettings) -> str:
    """Train and score every variant; returns the table."""
    storage = Storage(settings.storage)
    with rewriting(settings, storage):
        return _compare(settings, storage)


def _compare(settings: AblateSettings, storage: Storage) -> str:
    connect(settings.ray, dashboard=True)
    manifests = {
        role: list_collection(getattr(settings, role), join(settings.output, role, "manifest"), settings)
        for role in DOMAINS
    }
    inputs = {role: manifest.rows_digest for role, manifest in manifests.items()}
    inputs["backbone"] = model_digest(settings.backbone.name, load_network(settings.backbone, storage).model)
    truth = read_truth(settings.truth, storage)
    inputs["truth"] = digest([list(row) for row in truth])
    keys = {role: _keys(manifest, storage) for role, manifest in manifests.items()}
    places_of(truth, keys["sources"], keys["generated"], settings.truth.source_group_column)  # before any work
    job = _Run(settings, storage, manifests, keys, truth, inputs)
    found = _results(job)
    results = {variant.name: found[variant.name] for variant in settings.variants}

    files = {}
    for name, role in (("source_files", "sources"), ("query_files", "generated")):
        metadata = getattr(settings, role).metadata
        files[name] = [(metadata.key_prefix if metadata else "") + key for key in keys[role].keys]
    for variant in settings.variants:
        uri = join(settings.output, "vectors", f"{variant.file_name}.npz")
        write_vectors(uri, files, results[variant.name], storage)
    scores = {name: result.scores for name, result in results.items()}
    candidates = {v.name: scores[v.name] for v in settings.variants if v.learns_from == "views"}
    chosen: list[str] = []
    if len(candidates) > 1 and next(iter(scores.values())).macro_cells():
        scores[CHOSEN], chosen = chosen_by_folds(candidates, settings.num_folds, settings.seed)
    theory = {name: _theory(job, results[name]) for name in settings.theory}
    figures = {THEORY_CAPTION: cca.plot(theory)} if theory else {}
    if theory:
        storage.write_bytes(join(settings.output, "theory.svg"), figures[THEORY_CAPTION].encode())
    # The page reads its images from embed runs, which only end-to-end variants have.
    folder = next((job.folder(variant) for variant in settings.variants if variant.fine_tune), None)
    summary = write_comparison(
        scores,
        settings.output,
        storage,
        reference=settings.reference,
        title="Variants compared",
        images=folder and ImageFolders(join(folder, "generated"), {"": join(folder, "sources")}),
        figures=figures,
    )
    record = {
        "inputs": inputs,
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
        "variants": {name: {"history": r.history, "dimension": r.sources.shape[1]} for name, r in results.items()},
        CHOSEN: chosen,
        "theory": {name: measured.to_dict() for name, measured in theory.items()},
    }
    storage.write_json(join(settings.output, RECORD), record)
    return format_table(summary)


def _results(job: _Run) -> dict[str, VariantResult]:
    """Results by variant: read if they exist, else computed."""
    found: dict[str, VariantResult] = {}
    by_set: dict[tuple[str, str], list[VariantSettings]] = {}

    def keep(variant: VariantSettings, result: VariantResult) -> None:
        found[variant.name] = result
        place = f"{len(found)} of {len(job.settings.variants)}"
        logger.info(f"ablate: {variant.name}: macro mAP {result.macro_map:.4f} ({place})")

    for variant in job.settings.variants:
        done = read_result(job.folder(variant), job.storage)
        if done:
            keep(variant, done)
        elif not variant.fine_tune:
            views = variant.views if variant.learns_from == "views" else ""
            by_set.setdefault((variant.features, views), []).append(variant)
    for (features, views), variants in by_set.items():
        # One feature set at a time, because features take most of the memory.
        shared = put(_features(job, features, views, job.training(variants[0])))
        units = ((job.settings, variant, job.training(variant), shared, job.truth, job.storage) for variant in variants)
        for position, result in run_units(score_variant, units):
            write_result(job.folder(variants[position]), result, job.storage)
            keep(variants[position], result)
        del shared
    for variant in job.settings.variants:
        if variant.name not in found:
            result = _fine_tuned(job, variant)
            write_result(job.folder(variant), result, job.storage)
            keep(variant, result)
    return found


def _features(job: _Run, features: str, views: str, training: TrainSettings) -> AblationFeatures:
    """Features of one set, computed where missing. views: the name of a set of views; "": none."""
    num_views = job.settings.views_per_image if views else 0
    drawn = {"views": training.views.model_dump(), "num_views": num_views, "seed": job.settings.seed} if views else {}
    images = {name: value for name, value in job.inputs.items() if name != "truth"}
    used = [images, training.backbone.name, training.features.model_dump(), training.chunk_rows]
    made = []
    for role, name, count, extra in (
        ("sources", f"{features}-sources-{views or 'plain'}", num_views, drawn),
        ("generated", f"{features}-generated", 0, {}),
    ):
        manifest = job.manifests[role]
        folder = join(job.settings.output, "_features", f"{name}-{digest([*used, extra])[:12]}")
        made.append(view_features(training, manifest, folder, count, manifest.num_images, job.storage))
    return AblationFeatures(*made, job.keys["sources"], job.keys["generated"])


def _keys(manifest: Manifest, storage: Storage) -> Collection:
    """Keys and metadata of a manifest's images, with their ids in place of vectors."""
    table = pa.concat_tables(
        [storage.read_table(manifest.checked_uri(part, storage)) for part in range(len(manifest.num_rows))]
    )
    metadata = {name: table[name].to_pylist() for name in manifest.metadata_columns}
    return Collection(table["key"].to_pylist(), table["id"].to_numpy()[:, None], metadata)


def _fine_tuned(job: _Run, variant: VariantSettings) -> VariantResult:
    """Train a variant end to end by the train job under Ray Train, and embed by the embed job."""
    folder = job.folder(variant)
    training = job.training(variant).model_copy(update={"output": join(folder, "model")})
    record = train_job.run(training)
    collections, vectors = [], []
    for role, domain in DOMAINS.items():
        weights = {"weights": join(training.output, train_job.MODEL), "domain": domain}
        embed_job.run(
            EmbedSettings(
                storage=job.settings.storage,
                ray=job.settings.ray,
                manifest=job.manifests[role].uri,
                output=join(folder, role),
                backbone=job.settings.backbone.model_copy(update=weights),
                max_failed_share=0.0,
            )
        )
        found = read_collection(join(folder, role), job.storage)
        row_of = {key: i for i, key in enumerate(found.keys)}
        vectors.append(found.vectors[[row_of[key] for key in job.keys[role].keys]].astype("float32"))
        collections.append(found)
    return VariantResult(score(job.settings, *collections, job.truth), *vectors, record["history"])


def _theory(job: _Run, result: VariantResult) -> cca.CcaSummary:
    sources, queries = (
        Collection(job.keys[role].keys, vectors, job.keys[role].metadata)
        for role, vectors in (("sources", result.sources), ("generated", result.queries))
    )
    column = job.settings.truth.source_group_column
    return pair_theory(sources, queries, job.truth, "content", source_group_column=column)
