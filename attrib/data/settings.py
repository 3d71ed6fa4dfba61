"""Options of jobs.manifest, and the description of an image collection.

Options that were added later are left out of records while they have their default: the identity of a run is a digest
of its recorded settings, so a finished run is found again.
"""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, SerializationInfo, field_serializer, model_validator

from attrib.common.settings import IDENTITY, JobSettings, Positive, RescanSettings, Settings, Share, Uri

FIRST_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
EXTENSIONS = (*FIRST_EXTENSIONS, ".avif", ".jp2", ".j2k", ".jpx", ".jpf", ".jpc", ".j2c")
# Folders that network disks, archivers and Spark write beside the images: thumbnails, deleted and unfinished files.
EXCLUDE = ("@eaDir", "@__thumb", "@Recycle", "#recycle", "#snapshot", "$RECYCLE.BIN", "__MACOSX", "_temporary")


def later(default: Any, **rules: Any) -> Any:
    """Return a field that records leave out while it has its default."""
    return Field(default=default, exclude_if=lambda value: value == default, **rules)


class TableSettings(Settings):
    """A table (CSV, TSV, Parquet, or a folder of Parquet files): one row per image key, any further columns."""

    uri: Uri
    key_column: str = "key"
    key_prefix: str = ""  # the keys of the table are this prefix + the keys of the collection


class MetadataSettings(TableSettings):
    """The sidecar of a collection. A row describes the image of its key, or of its key and an extension."""

    ignore_folders: bool = later(False)  # the table's keys are file names, without the folders of the collection's keys


class CollectionSettings(Settings):
    """One image collection: a folder tree, WebDataset tar shards, or Parquet files."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    uri: Uri
    format: Literal["folder", "webdataset", "parquet"] = "folder"
    extensions: tuple[str, ...] = EXTENSIONS
    exclude: tuple[str, ...] = later(EXCLUDE)  # glob patterns: of one part of a path, or with a / of a whole path
    key_column: str | None = None  # Parquet; None with uri_column: the URI is the key
    bytes_column: str | None = None  # Parquet with the encoded images inside
    uri_column: str | None = None  # Parquet with URIs of image files
    allowed_roots: tuple[Uri, ...] = later(())  # what uri_column may name; empty: the collection's own folder
    max_image_bytes: Positive = later(1 << 30)  # larger files fail unread; 16-bit RGBA of 100 megapixels has 0.8e9
    metadata_columns: tuple[str, ...] = ()  # Parquet columns to copy into the manifest
    metadata: MetadataSettings | None = None

    @field_serializer("extensions")
    def _extensions_of_identity(self, extensions: tuple[str, ...], info: SerializationInfo) -> tuple[str, ...]:
        """In an identity the defaults stay those of the first version; a record holds what was listed."""
        return FIRST_EXTENSIONS if info.context == IDENTITY and extensions == EXTENSIONS else extensions

    @model_validator(mode="after")
    def _parquet_columns(self) -> Self:
        if self.format == "parquet":
            if (self.bytes_column is None) == (self.uri_column is None):
                raise ValueError("format 'parquet' needs exactly one of bytes_column and uri_column")
            if self.bytes_column and not self.key_column:
                raise ValueError("bytes_column needs key_column: ids are made from keys, not from row numbers")
        elif self.key_column or self.bytes_column or self.uri_column or self.metadata_columns:
            raise ValueError("key_column, bytes_column, uri_column and metadata_columns belong to format 'parquet'")
        if self.allowed_roots and not self.uri_column:
            raise ValueError("allowed_roots limits uri_column; without one, leave it out")
        return self


class ManifestSettings(RescanSettings):
    """jobs.manifest: list a collection and give every image an id."""

    execution_only: ClassVar[frozenset[str]] = JobSettings.execution_only | {"max_skipped_share"}
    made: ClassVar[tuple[str, ...]] = (r"part-\d{5,}\.parquet", "_listings")

    collection: CollectionSettings
    output: Uri
    partition_rows: Positive = 16_384  # rows per partition; one embeddings file per partition
    # If more of what looks like images or shards cannot be listed, the job fails. Half: a wrong path or format is
    # refused, a few odd files are counted.
    max_skipped_share: Share = 0.5
