"""The ablation job: features once per set, every variant a Ray task, end-to-end variants by the train job, one table and one page.

<output>/evaluation.json, table.txt, queries.parquet, comparison.html   as jobs.evaluate leaves them, for all variants
<output>/variants.json       settings, criterion by epoch and figures of theory of every variant
<output>/theory.svg          canonical correlations, alignment and whiteness
<output>/vectors/NAME.npz    source_files, sources, query_files, queries: for score.py beside the development images, and for others
"""

import io

import numpy as np
import pyarrow as pa
import ray

from attrib import cca
from attrib.ablate_settings import AblateSettings, VariantSettings
from attrib.ablation import Outcome, Pictures, score_variant, training_settings
from attrib.backbone import load_network, model_digest
from attrib.collection import Collection, read_collection
from attrib.comparison import Pictures as Thumbnails
from attrib.comparison import write_comparison
from attrib.distributed import embed, manifest, train
from attrib.distributed.features import view_features
from attrib.distributed.session import connect
from attrib.distributed.tasks import run_units
from attrib.evaluation import TruthRow, read_truth, score_truth
from attrib.manifest import Manifest, open_manifest
from attrib.records import begin, finish
from attrib.scores import format_table
from attrib.settings import EmbedSettings, ManifestSettings
from attrib.storage import Storage, join

RECORD = "variants.json"


def run(settings: AblateSettings) -> str:
    """Make and score every variant; returns the table."""
    storage = Storage(settings.storage)
    connect(settings.ray, dashboard=True)
    listed = {role: _manifest(settings, role, storage) for role in ("sources", "generated")}
    network = load_network(settings.backbone, storage)
    inputs = {role: found.rows_digest for role, found in listed.items()}
    inputs["backbone"] = model_digest(settings.backbone.name, network.model)
    if begin(settings, RECORD, inputs, storage):
        return storage.read_bytes(join(settings.output, "table.txt")).decode()
    truth = read_truth(settings.truth, storage)
    outcomes = _outcomes(settings, listed, truth, storage)
    outcomes = {variant.name: outcomes[variant.name] for variant in settings.variants}
    keys = {role: _keys(found, storage) for role, found in listed.items()}
    for name, outcome in outcomes.items():
        _write_vectors(settings, name, outcome, keys, storage)
    theory = {name: _theory(outcomes[name], keys, truth) for name in settings.theory}
    if theory:
        storage.write_bytes(join(settings.output, "theory.svg"), cca.plot(theory).encode())
    summary = write_comparison(
        {name: outcome.scores for name, outcome in outcomes.items()},
        settings.output,
        storage,
        reference=settings.reference,
        title="Variants compared",
        pictures=Thumbnails(*_picture_runs(settings)) if any(v.fine_tune for v in settings.variants) else None,
    )
    results = {name: {"history": o.history, "dimension": o.sources.shape[1]} for name, o in outcomes.items()}
    finish(
        settings,
        RECORD,
        inputs,
        {"variants": results, "theory": {name: found.to_dict() for name, found in theory.items()}},
        storage,
    )
    return format_table(summary)


def _outcomes(
    settings: AblateSettings, listed: dict[str, Manifest], truth: list[TruthRow], storage: Storage
) -> dict[str, Outcome]:
    found: dict[str, Outcome] = {}
    by_set: dict[tuple[str, str], list[VariantSettings]] = {}
    for variant in settings.variants:
        if not variant.fine_tune:
            by_set.setdefault((variant.features, variant.views), []).append(variant)
    for (features, views), variants in by_set.items():
        # One set of features at a time: they are most of the memory.
        pictures = ray.put(_pictures(settings, listed, features, views, variants, storage))
        units = (
            (settings, variant, _training(settings, variant, listed), pictures, truth, storage) for variant in variants
        )
        for position, outcome in run_units(score_variant, units):
            found[variants[position].name] = outcome
            print(
                f"ablate: {variants[position].name}: {_macro(outcome):.4f} ({len(found)} of {len(settings.variants)})"
            )
    for variant in settings.variants:
        if variant.fine_tune:
            found[variant.name] = _fine_tuned(settings, variant, listed, truth, storage)
            print(
                f"ablate: {variant.name}: {_macro(found[variant.name]):.4f} ({len(found)} of {len(settings.variants)})"
            )
    return found


def _manifest(settings: AblateSettings, role: str, storage: Storage) -> Manifest:
    output = join(settings.output, role, "manifest")
    common = {"storage": settings.storage, "ray": settings.ray}
    manifest.run(ManifestSettings(collection=getattr(settings, role), output=output, **common))
    return open_manifest(output, storage)


def _training(settings: AblateSettings, variant: VariantSettings, listed: dict[str, Manifest]):
    return training_settings(settings, variant, listed["sources"].uri, _folder(settings, variant))


def _folder(settings: AblateSettings, variant: VariantSettings) -> str:
    return join(settings.output, "_variants", "".join(c if c.isalnum() else "_" for c in variant.name))


def _pictures(
    settings: AblateSettings,
    listed: dict[str, Manifest],
    features: str,
    views: str,
    variants: list[VariantSettings],
    storage: Storage,
) -> Pictures:
    training = _training(settings, variants[0], listed)
    needs_views = any(variant.learns_from == "views" for variant in variants)
    folder = join(settings.output, "_features", features)
    source_features = view_features(
        training,
        listed["sources"],
        join(folder, f"sources_{views}" if needs_views else "sources"),
        settings.views_per_image if needs_views else 0,
        listed["sources"].num_images,
        storage,
    )
    generated = listed["generated"]
    query_features = view_features(training, generated, join(folder, "generated"), 0, generated.num_images, storage)
    keys = {role: _keys(found, storage) for role, found in listed.items()}
    return Pictures(source_features, query_features, keys["sources"], keys["generated"])


def _keys(found: Manifest, storage: Storage) -> Collection:
    """The images of a manifest with their ids in the place of vectors."""
    parts = [storage.read_table(found.partition_uri(p)) for p in range(len(found.num_rows))]
    table = pa.concat_tables(parts)
    metadata = {name: table[name].to_pylist() for name in found.metadata_columns}
    return Collection(table["key"].to_pylist(), table["id"].to_numpy()[:, None], metadata)


def _fine_tuned(
    settings: AblateSettings,
    variant: VariantSettings,
    listed: dict[str, Manifest],
    truth: list[TruthRow],
    storage: Storage,
) -> Outcome:
    """A variant trained end to end by the train job under Ray Train, and its vectors by the embed job."""
    training = _training(settings, variant, listed)
    record = train.run(training)
    backbone = settings.backbone.model_copy(update={"weights": join(training.output, train.MODEL)})
    collections = {}
    for role, domain in (("sources", "real"), ("generated", "synthetic")):
        output = join(training.output, role)
        embed.run(
            EmbedSettings(
                storage=settings.storage,
                ray=settings.ray,
                manifest=listed[role].uri,
                output=output,
                backbone=backbone.model_copy(update={"domain": domain}),
                max_failed_share=settings.max_failed_share,
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
        vectors.append(collections[role].vectors[rows].astype(np.float32))
    return Outcome(scores, *vectors, record["history"])


def _picture_runs(settings: AblateSettings) -> tuple[str, dict[str, str]]:
    """The embed runs of an end-to-end variant, by which the page finds its pictures."""
    folder = next(_folder(settings, variant) for variant in settings.variants if variant.fine_tune)
    return join(folder, "generated"), {"": join(folder, "sources")}


def _write_vectors(
    settings: AblateSettings, name: str, outcome: Outcome, keys: dict[str, Collection], storage: Storage
) -> None:
    prefix = {
        role: getattr(settings, role).metadata.key_prefix if getattr(settings, role).metadata else "" for role in keys
    }
    buffer = io.BytesIO()
    np.savez(
        buffer,
        source_files=np.array([prefix["sources"] + key for key in keys["sources"].keys]),
        sources=outcome.sources,
        query_files=np.array([prefix["generated"] + key for key in keys["generated"].keys]),
        queries=outcome.queries,
    )
    safe = "".join(c if c.isalnum() else "_" for c in name)
    storage.write_bytes(join(settings.output, "vectors", f"{safe}.npz"), buffer.getvalue())


def _theory(outcome: Outcome, keys: dict[str, Collection], truth: list[TruthRow]) -> cca.CcaSummary:
    """Of the pairs of a query and an image of its content's group: one pair for each query."""
    image_of_group = {group: i for i, group in reversed(list(enumerate(keys["sources"].column("group"))))}
    place = {key: i for i, key in enumerate(keys["generated"].keys)}
    pairs = [(image_of_group[row.group], place[row.query], row.group) for row in truth if row.role == "content"]
    real, synthetic, groups = (np.array(column) for column in zip(*pairs))
    return cca.summarise(outcome.sources[real], outcome.queries[synthetic], groups)


def _macro(outcome: Outcome) -> float:
    rows, values = outcome.scores.rows_of_cells(), outcome.scores.values["ap"]
    return float(np.mean([values[rows[cell]].mean() for cell in outcome.scores.macro_cells()]))
