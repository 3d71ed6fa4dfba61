"""Options of jobs.manifest, and the description of an image collection."""

from typing import Literal, Self

from pydantic import Field, model_validator

from attrib.common.settings import JobSettings, Positive, Settings, Uri


class MetadataSettings(Settings):
    """A sidecar table (CSV, TSV or Parquet): one row per image key, any further columns."""

    uri: Uri
    key_column: str = "key"
    key_prefix: str = ""  # the keys of the table are this prefix + the keys of the collection


class CollectionSettings(Settings):
    """One image collection: a folder tree, WebDataset tar shards, or Parquet files."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    uri: Uri
    format: Literal["folder", "webdataset", "parquet"] = "folder"
    extensions: tuple[str, ...] = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
    key_column: str | None = None  # Parquet; None with uri_column: the URI is the key
    bytes_column: str | None = None  # Parquet with the encoded images inside
    uri_column: str | None = None  # Parquet with URIs of image files
    metadata_columns: tuple[str, ...] = ()  # Parquet columns to copy into the manifest
    metadata: MetadataSettings | None = None

    @model_validator(mode="after")
    def _parquet_columns(self) -> Self:
        if self.format == "parquet":
            if (self.bytes_column is None) == (self.uri_column is None):
                raise ValueError("format 'parquet' needs exactly one of bytes_column and uri_column")
            if self.bytes_column and not self.key_column:
                raise ValueError("bytes_column needs key_column: ids are made from keys, not from row numbers")
        elif self.key_column or self.bytes_column or self.uri_column or self.metadata_columns:
            raise ValueError("key_column, bytes_column, uri_column and metadata_columns belong to format 'parquet'")
        return self


class ManifestSettings(JobSettings):
    """jobs.manifest: list a collection and give every image an id."""

    collection: CollectionSettings
    output: Uri
    partition_rows: Positive = 16_384  # rows per partition; one embeddings file per partition
