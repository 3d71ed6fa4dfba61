"""The ablation job: features once per set, every variant a Ray task, end-to-end variants by the train job, one table and one page.

<output>/evaluation.json, table.txt, queries.parquet, comparison.html   as jobs.evaluate leaves them, for all variants
<output>/ablation.json       settings, criterion by epoch and figures of theory of every variant
<output>/theory.svg          canonical correlations, alignment and whiteness
<output>/vectors/NAME.npz    source_files, sources, query_files, queries: for score.py beside the development images, and for others
<output>/_features/, _variants/   what is done, by digest of all that decides it: a killed run continues, and one with more variants adds them
"""

import logging

import pyarrow as pa

from attrib.common.config import digest, versions
from attrib.common.storage import Storage, join
from attrib.data.job import list_collection
from attrib.data.manifest import Manifest
from attrib.embed import job as embed_job
from attrib.embed.settings import EmbedSettings
from attrib.evaluate import cca
from attrib.evaluate.ablation.results import read_outcome, write_outcome, write_vectors
from attrib.evaluate.ablation.settings import CHOSEN, AblateSettings, VariantSettings
from attrib.evaluate.ablation.variants import AblationFeatures, Outcome, chosen_by_folds, score_variant
from attrib.evaluate.collection import Collection, read_collection
from attrib.evaluate.page import ImageFolders, write_comparison
from attrib.evaluate.pair_measures import THEORY_CAPTION, pair_theory
from attrib.evaluate.protocol import TruthRow, places_of, read_truth, score_truth
from attrib.evaluate.scores import format_table
from attrib.models.encoder import load_network, model_digest
from attrib.runtime.session import connect, put
from attrib.runtime.tasks import run_units
from attrib.train import job as train_job
from attrib.train.feature_tasks import view_features

logger = logging.getLogger(__name__)

RECORD = "ablation.json"


def run(settings: AblateSettings) -> str:
    """Make and score every variant; returns the table."""
    storage = Storage(settings.storage)
    connect(settings.ray, dashboard=True)
    listed = {
        role: list_collection(getattr(settings, role), join(settings.output, role, "manifest"), settings)
        for role in ("sources", "generated")
    }
    network = load_network(settings.backbone, storage)
    inputs = {role: found.rows_digest for role, found in listed.items()}
    inputs["backbone"] = model_digest(settings.backbone.name, network.model)
    truth = read_truth(settings.truth, storage)
    keys = {role: _keys(found, storage) for role, found in listed.items()}
    places_of(truth, keys["sources"], keys["generated"], settings.truth.source_group_column)  # before any work
    asked = inputs | {"truth": digest([list(row) for row in truth])}
    outcomes = _outcomes(settings, asked, listed, truth, storage)
    outcomes = {variant.name: outcomes[variant.name] for variant in settings.variants}
    for variant in settings.variants:
        outcome = outcomes[variant.name]
        prefixes = [getattr(settings, role).metadata for role in ("sources", "generated")]
        prefixes = [metadata.key_prefix if metadata else "" for metadata in prefixes]
        files = [[prefix + key for key in keys[role].keys] for prefix, role in zip(prefixes, keys)]
        write_vectors(join(settings.output, "vectors", f"{variant.file_name}.npz"), files, outcome, storage)
    scores = {name: outcome.scores for name, outcome in outcomes.items()}
    candidates = {v.name: scores[v.name] for v in settings.variants if v.learns_from == "views"}
    chosen: list[str] = []
    if len(candidates) > 1 and next(iter(scores.values())).macro_cells():
        scores[CHOSEN], chosen = chosen_by_folds(candidates, settings.num_folds, settings.seed)
    theory = {name: _theory(settings, outcomes[name], keys, truth) for name in settings.theory}
    figures = {THEORY_CAPTION: cca.plot(theory)} if theory else {}
    if theory:
        storage.write_bytes(join(settings.output, "theory.svg"), figures[THEORY_CAPTION].encode())
    tuned = [variant for variant in settings.variants if variant.fine_tune]
    images = None
    if tuned:
        folder = _folder(settings, asked, tuned[0])
        images = ImageFolders(join(folder, "generated"), {"": join(folder, "sources")})
    summary = write_comparison(
        scores,
        settings.output,
        storage,
        reference=settings.reference,
        title="Variants compared",
        images=images,
        figures=figures,
    )
    made = {name: {"history": o.history, "dimension": o.sources.shape[1]} for name, o in outcomes.items()}
    record = {"inputs": asked, "settings": settings.model_dump(mode="json"), "versions": versions()}
    record |= {"variants": made, CHOSEN: chosen, "theory": {name: found.to_dict() for name, found in theory.items()}}
    storage.write_json(join(settings.output, RECORD), record)
    return format_table(summary)


def _outcomes(
    settings: AblateSettings,
    inputs: dict,
    listed: dict[str, Manifest],
    truth: list[TruthRow],
    storage: Storage,
) -> dict[str, Outcome]:
    found: dict[str, Outcome] = {}
    by_set: dict[tuple[str, str], list[VariantSettings]] = {}

    def keep(variant: VariantSettings, outcome: Outcome) -> None:
        found[variant.name] = outcome
        place = f"{len(found)} of {len(settings.variants)}"
        logger.info(f"ablate: {variant.name}: macro mAP {outcome.macro_map:.4f} ({place})")

    for variant in settings.variants:
        done = read_outcome(_folder(settings, inputs, variant), storage)
        if done:
            keep(variant, done)
        elif not variant.fine_tune:
            views = variant.views if variant.learns_from == "views" else ""
            by_set.setdefault((variant.features, views), []).append(variant)
    for (features, views), variants in by_set.items():
        # One set of features at a time: they are most of the memory.
        pictures = put(_pictures(settings, inputs, listed, features, views, variants[0], storage))
        units = (
            (settings, variant, _training(settings, inputs, variant, listed), pictures, truth, storage)
            for variant in variants
        )
        for position, outcome in run_units(score_variant, units):
            write_outcome(_folder(settings, inputs, variants[position]), outcome, storage)
            keep(variants[position], outcome)
        del pictures
    for variant in settings.variants:
        if variant.name not in found:
            outcome = _fine_tuned(settings, inputs, variant, listed, truth, storage)
            write_outcome(_folder(settings, inputs, variant), outcome, storage)
            keep(variant, outcome)
    return found


def _training(settings: AblateSettings, inputs: dict, variant: VariantSettings, listed: dict[str, Manifest]):
    return settings.training(variant, listed["sources"].uri, _folder(settings, inputs, variant))


def _folder(settings: AblateSettings, inputs: dict, variant: VariantSettings) -> str:
    """Of what a variant leaves, named by all that decides it but its name."""
    decides = settings.training(variant, "/", "/").model_dump(mode="json", exclude={"storage", "ray", "num_workers"})
    used = digest(
        [inputs, decides, variant.learns_from, variant.kinds, settings.truth.model_dump(), settings.num_folds]
    )
    return join(settings.output, "_variants", f"{variant.file_name}-{used[:12]}")


def _pictures(
    settings: AblateSettings,
    inputs: dict,
    listed: dict[str, Manifest],
    features: str,
    views: str,
    variant: VariantSettings,
    storage: Storage,
) -> AblationFeatures:
    training = _training(settings, inputs, variant, listed)
    num_views = settings.views_per_image if views else 0
    seen = {"views": training.views.model_dump(), "num_views": num_views, "seed": settings.seed} if views else {}
    images = {name: value for name, value in inputs.items() if name != "truth"}
    used = [images, training.backbone.name, training.features.model_dump(), training.chunk_rows]
    folder = join(settings.output, "_features")
    sources, generated = listed["sources"], listed["generated"]
    made = [
        view_features(training, found, join(folder, f"{name}-{digest([*used, extra])[:12]}"), count, found.num_images, storage)
        for found, name, count, extra in (
            (sources, f"{features}-sources-{views or 'plain'}", num_views, seen),
            (generated, f"{features}-generated", 0, {}),
        )
    ]  # fmt: skip
    return AblationFeatures(*made, _keys(sources, storage), _keys(generated, storage))


def _keys(found: Manifest, storage: Storage) -> Collection:
    """The images of a manifest with their ids in the place of vectors."""
    parts = [storage.read_table(found.partition_uri(p)) for p in range(len(found.num_rows))]
    table = pa.concat_tables(parts)
    metadata = {name: table[name].to_pylist() for name in found.metadata_columns}
    return Collection(table["key"].to_pylist(), table["id"].to_numpy()[:, None], metadata)


def _fine_tuned(
    settings: AblateSettings,
    inputs: dict,
    variant: VariantSettings,
    listed: dict[str, Manifest],
    truth: list[TruthRow],
    storage: Storage,
) -> Outcome:
    """A variant trained end to end by the train job under Ray Train, and its vectors by the embed job."""
    training = _training(settings, inputs, variant, listed)
    training = training.model_copy(update={"output": join(training.output, "model")})
    record = train_job.run(training)
    folder = _folder(settings, inputs, variant)
    backbone = settings.backbone.model_copy(update={"weights": join(training.output, train_job.MODEL)})
    collections = {}
    for role, domain in (("sources", "real"), ("generated", "synthetic")):
        output = join(folder, role)
        embed_job.run(
            EmbedSettings(
                storage=settings.storage,
                ray=settings.ray,
                manifest=listed[role].uri,
                output=output,
                backbone=backbone.model_copy(update={"domain": domain}),
                max_failed_share=0.0,
            )
        )
        collections[role] = read_collection(output, storage)
    scores = score_truth(
        collections["sources"],
        collections["generated"],
        truth,
        source_group_column=settings.truth.source_group_column,
        query_method_column=settings.truth.query_method_column,
    )
    vectors = []
    for role in ("sources", "generated"):
        place = {key: i for i, key in enumerate(collections[role].keys)}
        rows = [place[key] for key in _keys(listed[role], storage).keys]
        vectors.append(collections[role].vectors[rows].astype("float32"))
    return Outcome(scores, *vectors, record["history"])


def _theory(
    settings: AblateSettings, outcome: Outcome, keys: dict[str, Collection], truth: list[TruthRow]
) -> cca.CcaSummary:
    sources = Collection(keys["sources"].keys, outcome.sources, keys["sources"].metadata)
    queries = Collection(keys["generated"].keys, outcome.queries, keys["generated"].metadata)
    return pair_theory(sources, queries, truth, "content", source_group_column=settings.truth.source_group_column)
