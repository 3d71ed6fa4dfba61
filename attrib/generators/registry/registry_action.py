"""The three actions of jobs.registry, and the lines that it prints."""

import logging

from attrib.common.errors import AttribError, first_line
from attrib.common.storage import Storage, join
from attrib.generators.fingerprints.base import Method
from attrib.generators.registry.comparability import registry_warnings
from attrib.generators.registry.method_loading import load_method
from attrib.generators.registry.quality import format_counts
from attrib.generators.registry.registration import as_sources, describe, facts, read_collection, read_pool_samples
from attrib.generators.registry.registry import RECORD, Registry, new_registry, open_registry, register, remove
from attrib.generators.registry.settings import RegistrySettings, VerdictSettings

logger = logging.getLogger(__name__)


def run(settings: RegistrySettings) -> list[str]:
    """Do what settings.action says and return lines about the registry as it then is."""
    storage = Storage(settings.storage)
    if settings.action == "register":
        return _register(settings, storage)
    registry = open_registry(settings.registry, storage)
    if settings.action == "remove":
        registry = remove(registry, settings.name, storage, settings.version)
    return lines(registry, storage, settings.device)


def _register(settings: RegistrySettings, storage: Storage) -> list[str]:
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
    return [
        f"{entry.name} version {entry.version} as {entry.role}: {given}{without}",
        *lines(registry, storage, settings.device),
    ]


def _opened(settings: RegistrySettings, storage: Storage) -> tuple[Registry, Method]:
    """The registry, which is written with its first entry, and its method. Raises AttribError if settings ask for another one than it has."""
    if not storage.exists(join(settings.registry, RECORD)):
        if settings.method is None:
            raise AttribError(f"{settings.registry} is a new registry, so method must say what makes its fingerprints")
        method = load_method(settings.method, storage, settings.device)
        return new_registry(settings.registry, settings.method, method, settings.degradations, storage), method
    registry = open_registry(settings.registry, storage)
    if settings.method is not None and settings.method != registry.method:
        given, made = settings.method.model_dump(), registry.method.model_dump()
        other = ", ".join(f"method.{key} {made[key]!r}, not {given[key]!r}" for key in made if made[key] != given[key])
        raise AttribError(f"{settings.registry} was made with {other}; ask for what it has, or start a new registry")
    if "degradations" in settings.model_fields_set and settings.degradations != registry.degradations:
        raise AttribError(
            f"{settings.registry} was made with degradations {list(registry.degradations)}, not {list(settings.degradations)}; ask "
            "for these, or start a new registry"
        )
    return registry, load_method(registry.method, storage, settings.device)


def lines(registry: Registry, storage: Storage, device: str) -> list[str]:
    """A line about the registry, one per active entry, and what is to be known to read them. Where the method or references are gone, the
    entries are listed without what only they can tell."""
    settings, notes = VerdictSettings(), []
    try:
        rows = describe(registry, load_method(registry.method, storage, device), settings, storage)
        if len(registry.generators) > 1:
            notes.append(
                f"families by family_accuracy {settings.family_accuracy:g} and family_level {settings.family_level:g}, the defaults of "
                "jobs.identify; other settings there can make other families"
            )
    except (AttribError, OSError) as error:
        rows = facts(registry)
        notes.append(f"WARNING: self-similarity and families cannot be told: {first_line(error)}")
    notes += [f"WARNING: {warning}" for warning in registry_warnings(registry.active)]
    made_by = f"fingerprints by {registry.method.name} ({registry.method_digest[:12]})"
    return [f"{registry.uri}: {len(rows)} entries, {made_by}", *map(_line, rows), *notes]


def _line(row: dict) -> str:
    text = f"  {row['name']} v{row['version']} ({row['role']}): {row['num_images']:,} images"
    if "self_similarity" in row:
        text += f", self-similarity {row['self_similarity']:.3f}"
    if "nearest" in row:
        text += f", nearest {row['nearest']} {row['nearest_score']:.3f} (told apart {row['pair_accuracy']:.0%})"
    if len(row.get("family", [])) > 1:
        text += f", one family with {', '.join(name for name in row['family'] if name != row['name'])}"
    return text
