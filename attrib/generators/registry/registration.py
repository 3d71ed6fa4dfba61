"""The actions of jobs.registry: register images on disk as a generator or as negatives, list entries, remove them."""

import logging
from collections.abc import Sequence

import numpy as np

from attrib.common.errors import AttribError, ImageError, first_line
from attrib.common.outputs import check_output
from attrib.common.storage import Storage, join
from attrib.data.collections import list_images, list_units
from attrib.data.reading import read_image, read_parquet_images
from attrib.data.selection import Skipped
from attrib.data.settings import CollectionSettings
from attrib.generators.fingerprints.base import Method
from attrib.generators.registry.comparability import registry_warnings
from attrib.generators.registry.galleries import Galleries, compare, families
from attrib.generators.registry.method_loading import load_method
from attrib.generators.registry.quality import ReferenceFilter, format_counts
from attrib.generators.registry.registry import RECORD, Registry, new_registry, open_registry, register, remove
from attrib.generators.registry.settings import RegistrySettings, VerdictSettings
from attrib.generators.signals.samples import Sample, drawn_sample, read_sample
from attrib.generators.synthesis.pool import open_pool

logger = logging.getLogger(__name__)


def read_collection(
    collection: CollectionSettings, max_images: int, max_megapixels: float, method: Method, storage: Storage
) -> tuple[list[Sample], dict[str, int], list[str]]:
    """At most max_images usable images of a collection, counts of the unusable ones by reason, and their errors.

    Images are evenly spaced in the order of keys. Unusable ones are replaced by others of the collection.
    """
    skipped = Skipped()
    tables = [list_images(unit, collection, storage, skipped) for unit in list_units(collection, storage, skipped)]
    if skipped.counts:
        logger.info(f"{collection.uri}: listing left out {skipped.describe()}")
    rows = sorted((row for table in tables for row in table.to_pylist()), key=lambda row: row["key"])
    if not rows:
        raise AttribError(f"{collection.uri} contains no image; correct the path or the option extensions")
    spaced = np.linspace(0, len(rows) - 1, min(max_images, len(rows))).round().astype(int)
    wanted = ReferenceFilter(method)
    samples: list[Sample] = []
    failures: list[str] = []
    for i in dict.fromkeys([*spaced.tolist(), *range(len(rows))]):
        if len(samples) == max_images:
            break
        row = rows[i]
        try:
            if collection.bytes_column:
                (data,) = read_parquet_images([row], collection.bytes_column, storage)
                if isinstance(data, ImageError):
                    raise data
            else:
                data = read_image(row, storage, collection)
            sample = read_sample(data, max_megapixels)
        except ImageError as error:
            wanted.failed(error)
            failures.append(f"{row['key']}: {error}")
            continue
        if wanted.takes(sample):
            samples.append(sample)
    return samples, dict(wanted.left_out), failures


def read_pool_samples(uri: str, images_per_model: int, storage: Storage) -> list[list[Sample]]:
    """images_per_model images of each model of a pool; models show different photographs, to share little content."""
    pool = open_pool(uri, storage)
    sources = []
    for position, model in enumerate(pool.models):
        images = pool.samples(model.model_id, storage)
        if len(images) < images_per_model:
            raise AttribError(
                f"a model of {uri} has {len(images)} images, and images_per_model is {images_per_model}; lower it"
            )
        at = (position * images_per_model + np.arange(images_per_model)) % len(images)
        sources.append([drawn_sample(images[i]) for i in at])
    return sources


def as_sources(samples: Sequence[Sample], role: str) -> list[list[Sample]]:
    """Samples grouped by source: each photograph is a source; all images of a generator are one source."""
    return [[sample] for sample in samples] if role == "photographs" else [list(samples)]


def describe(registry: Registry, method: Method, settings: VerdictSettings, storage: Storage) -> list[dict]:
    """The rows of `facts`; those of generators have more columns:

    self_similarity: mean leave-one-out score of the references. nearest, nearest_score: the other generator with the
    highest mean score for these references. pair_accuracy: share of the references of both generators that score higher
    for their own generator. family: names of its members.
    """
    registry.check_method(method)
    rows, generators = facts(registry), registry.generators
    if not generators:
        return rows
    own, owner = Galleries(method, [registry.read(entry, storage) for entry in generators]).leave_one_out()
    own = own[0, :, 0]
    label = families(own, owner, settings.family_accuracy, settings.family_level)
    for g, row in enumerate(rows[: len(generators)]):
        means = own[owner == g].mean(axis=0, dtype=np.float64)
        row["self_similarity"] = round(float(means[g]), 4)
        row["family"] = [generators[i].name for i in np.flatnonzero(label == label[g])]
        if len(generators) > 1:
            nearest = int(np.where(np.arange(len(means)) == g, -np.inf, means).argmax())
            accuracy, _ = compare(own, owner, g, nearest, settings.family_accuracy)
            row["nearest"], row["nearest_score"] = generators[nearest].name, round(float(means[nearest]), 4)
            row["pair_accuracy"] = round(accuracy, 4)
    return rows


def facts(registry: Registry) -> list[dict]:
    """One row per active entry, generators first. Does not read the references."""
    names = ("name", "version", "role", "num_images", "codecs", "sides_px", "left_out")
    return [
        {name: getattr(entry, name) for name in names} | {"num_sources": len(entry.source_sizes)}
        for entry in (*registry.generators, *registry.negatives)
    ]


def run(settings: RegistrySettings) -> list[str]:
    """Execute settings.action and return lines that describe the registry afterwards."""
    storage, done = Storage(settings.storage), []
    if settings.action == "register":
        check_output(settings, (RECORD,), storage, output_key="registry")
        registry, registered = _register(settings, storage)
        done.append(registered)
    else:
        registry = open_registry(settings.registry, storage)
        if settings.action == "remove":
            registry = remove(registry, settings.name, storage, settings.version)
    return [*done, *lines(registry, storage, settings.device)]


def _register(settings: RegistrySettings, storage: Storage) -> tuple[Registry, str]:
    registry, method = _opened(settings, storage)
    left_out: dict[str, int] = {}
    if settings.pool:
        sources = read_pool_samples(settings.pool, settings.images_per_model, storage)
    else:
        samples, left_out, failures = read_collection(
            settings.images, settings.max_images, settings.max_megapixels, method, storage
        )
        for failure in failures:
            logger.info(f"left out: {failure}")
        sources = as_sources(samples, settings.role)
    registry, entry = register(
        registry, settings.name, settings.role, sources, method, storage, settings.new_version, left_out
    )
    given = f"{entry.num_images:,} images, {', '.join(f'{n} {codec}' for codec, n in entry.codecs.items())}"
    without = f"; left out: {format_counts(entry.left_out)}" if entry.left_out else ""
    return registry, f"{entry.name} version {entry.version} as {entry.role}: {given}{without}"


def _opened(settings: RegistrySettings, storage: Storage) -> tuple[Registry, Method]:
    """The registry and its method. Raises AttribError if the settings contradict an existing registry."""
    if not storage.exists(join(settings.registry, RECORD)):
        if settings.method is None:
            raise AttribError(f"{settings.registry} is a new registry; set method to choose its fingerprint method")
        method = load_method(settings.method, storage, settings.device)
        return new_registry(settings.registry, settings.method, method, settings.degradations, storage), method
    registry = open_registry(settings.registry, storage)
    if settings.method is not None and settings.method != registry.method:
        given, made = settings.method.model_dump(), registry.method.model_dump()
        other = ", ".join(f"method.{key} {made[key]!r}, not {given[key]!r}" for key in made if made[key] != given[key])
        raise AttribError(f"{settings.registry} was made with {other}; leave method out, or choose a new registry")
    if "degradations" in settings.model_fields_set and settings.degradations != registry.degradations:
        raise AttribError(
            f"{settings.registry} was made with degradations {list(registry.degradations)}, not "
            f"{list(settings.degradations)}; leave degradations out, or choose a new registry"
        )
    return registry, load_method(registry.method, storage, settings.device)


def lines(registry: Registry, storage: Storage, device: str) -> list[str]:
    """Lines of text about the registry: one for the registry, one per entry, then warnings.

    If the method or references are missing, the lines lack self-similarity and families.
    """
    settings, notes = VerdictSettings(), []
    try:
        rows = describe(registry, load_method(registry.method, storage, device), settings, storage)
        if len(registry.generators) > 1:
            notes.append(
                f"families by family_accuracy {settings.family_accuracy:g} and family_level {settings.family_level:g}, "
                "the defaults of jobs.identify; other values there can give other families"
            )
    except (AttribError, OSError) as error:
        rows = facts(registry)
        notes.append(f"WARNING: self-similarity and families are not known: {first_line(error)}")
    notes += [f"WARNING: {warning}" for warning in registry_warnings(registry.active)]
    made_by = f"fingerprints by {registry.method.name} ({registry.method_digest[:12]})"
    return [f"{registry.uri}: {len(rows)} entries, {made_by}", *map(_line, rows), *notes]


def _line(row: dict) -> str:
    text = f"  {row['name']} v{row['version']} ({row['role']}): {row['num_images']:,} images"
    if "self_similarity" in row:
        text += f", self-similarity {row['self_similarity']:.3f}"
    if "nearest" in row:
        accuracy = f"{row['pair_accuracy']:.0%} assigned correctly"
        text += f", nearest {row['nearest']} {row['nearest_score']:.3f} ({accuracy})"
    if len(row.get("family", [])) > 1:
        text += f", one family with {', '.join(name for name in row['family'] if name != row['name'])}"
    return text
