"""The three actions of jobs.registry, and the lines that it prints."""

import sys

from attrib.errors import AttribError
from attrib.generators.method_loading import load_method
from attrib.generators.registration import as_sources, describe, read_collection, read_pool_samples
from attrib.generators.registry import RECORD, Registry, create_registry, open_registry, register, remove
from attrib.generators.registry_settings import RegistrySettings, VerdictSettings
from attrib.storage import Storage, join


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
    if storage.exists(join(settings.registry, RECORD)):
        registry = open_registry(settings.registry, storage)
        if settings.method is not None and settings.method != registry.method:
            raise AttribError(
                f"{settings.registry} was made with method {registry.method.name!r} of {registry.method.uri}; leave method out, or start a "
                "new registry"
            )
        method = load_method(registry.method, storage, settings.device)
    elif settings.method is None:
        raise AttribError(f"{settings.registry} is a new registry, so method must say what makes its fingerprints")
    else:
        method = load_method(settings.method, storage, settings.device)
        registry = create_registry(settings.registry, settings.method, method, settings.degradations, storage)
    if settings.pool:
        sources = read_pool_samples(settings.pool, settings.images_per_model, storage)
    else:
        samples, failures = read_collection(settings.images, settings.max_images, settings.max_megapixels, storage)
        for failure in failures:
            print(f"left out: {failure}", file=sys.stderr)
        sources = as_sources(samples, settings.role)
    registry, entry = register(
        registry, settings.name, settings.role, sources, method, storage, new_version=settings.new_version
    )
    given = f"{entry.num_images:,} images, {', '.join(f'{n} {codec}' for codec, n in entry.codecs.items())}"
    return [
        f"{entry.name} version {entry.version} as {entry.role}: {given}",
        *lines(registry, storage, settings.device),
    ]


def lines(registry: Registry, storage: Storage, device: str) -> list[str]:
    """A line about the registry and one per active entry."""
    method = load_method(registry.method, storage, device)
    rows = describe(registry, method, VerdictSettings(), storage)
    said = [f"{registry.uri}: {len(rows)} entries, fingerprints by {method.name} ({registry.method_digest[:12]})"]
    for row in rows:
        text = f"  {row['name']} v{row['version']} ({row['role']}): {row['num_images']:,} images"
        if "self_similarity" in row:
            text += f", self-similarity {row['self_similarity']:.3f}"
        if "nearest" in row:
            text += f", nearest {row['nearest']} {row['nearest_score']:.3f} (told apart {row['pair_accuracy']:.0%})"
        if len(row.get("family", [])) > 1:
            text += f", one family with {', '.join(name for name in row['family'] if name != row['name'])}"
        said.append(text)
    return said
