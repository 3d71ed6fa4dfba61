"""What is wrong with the inputs or the output of a pipeline is found before the first image is read."""

import uuid

from attrib.common.errors import AttribError, first_line
from attrib.common.storage import Storage, join
from attrib.data.collections import list_units
from attrib.data.settings import CollectionSettings
from attrib.data.sidecar import open_sidecar
from attrib.generators.registry.method_loading import load_method
from attrib.generators.registry.registry import open_registry
from attrib.models.encoder import load_network
from attrib.pipeline.settings import PipelineSettings


def check_pipeline(settings: PipelineSettings, storage: Storage) -> None:
    """Raise AttribError if a collection, metadata, weights, registry or its method cannot be read, a column of the
    report is not there, or the output cannot be written. Nothing is left in the output.
    """
    stages = settings.stages()
    columns = {role: metadata_columns(getattr(settings, role), storage) for role in ("sources", "generated")}
    unknown = [name for name in stages["report"].roll_up if name not in columns["sources"]]
    if unknown:
        raise AttribError(
            f"report.roll_up: the sources have no metadata column {unknown[0]!r}; choose from "
            f"{', '.join(columns['sources']) or 'none (sources.metadata is not set)'}"
        )
    network = load_network(stages["sources/embeddings"].backbone, storage)
    if network.has_head:  # it may have one of the two domains alone
        load_network(stages["generated/embeddings"].backbone, storage)
    if "generators" in stages:
        load_method(open_registry(stages["generators"].registry, storage).method, storage)
    check_can_write(settings.output, storage)


def metadata_columns(collection: CollectionSettings, storage: Storage) -> list[str]:
    """Return the names of the columns that the manifest of a collection will have.

    Raises AttribError if the collection or its table cannot be opened.
    """
    list_units(collection, storage)
    columns = list(collection.metadata_columns)
    if collection.metadata:
        names = open_sidecar(collection.metadata, storage).schema.names
        columns += [name for name in names if name != collection.metadata.key_column]
    return columns


def check_can_write(output: str, storage: Storage) -> None:
    """Raise AttribError if no file can be written to a folder."""
    probe = join(output, f".can-write-{uuid.uuid4().hex}")  # hidden files are not taken for a user's
    try:
        storage.write_bytes(probe, b"")
        storage.delete_file(probe)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise AttribError(
            f"output {output} cannot be written ({reason}); correct its rights, or choose another folder"
        ) from error
