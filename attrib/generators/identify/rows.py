"""Verdict rows from the bytes of a manifest's images."""

from collections.abc import Iterable
from dataclasses import asdict

import numpy as np
import pyarrow as pa

from attrib.common.errors import ImageError
from attrib.generators.identify.files import VERDICT_FIELDS, schema
from attrib.generators.identify.verdicts import UNASSESSABLE, Judge, assess
from attrib.generators.signals.samples import Sample, read_sample

MAX_WAITING = 64  # decoded images that are held until their fingerprints are taken
MAX_WAITING_BYTES = 64 << 20


def verdict_rows(
    rows: list[dict], encoded: Iterable[bytes | ImageError], judge: Judge, max_megapixels: float
) -> pa.Table:
    """Table with `schema` for manifest rows and their bytes, in order. The error of an image becomes its reason."""
    found: list[dict] = []
    vectors = np.full((len(rows), judge.galleries.references[0].shape[2]), np.nan, np.float32)
    waiting: dict[int, Sample] = {}
    for place, (row, data) in enumerate(zip(rows, encoded)):
        verdict = {"id": row["id"], "key": row["key"], "uri": row["uri"]}
        found.append(verdict)
        try:
            if isinstance(data, ImageError):
                raise data
            sample = read_sample(data, max_megapixels)
        except ImageError as error:
            verdict |= {"verdict": UNASSESSABLE, "stage": error.stage, "reason": f"{error.stage}: {error.reason}"}
            continue
        height, width = sample.image.shape[1:]
        verdict |= {"width": width, "height": height, "codec": sample.codec}
        waiting[place] = sample
        if len(waiting) == MAX_WAITING or sum(s.image.numel() for s in waiting.values()) > MAX_WAITING_BYTES:
            _assess(waiting, found, vectors, judge)
    _assess(waiting, found, vectors, judge)
    table = pa.Table.from_pylist(found, schema=pa.schema(VERDICT_FIELDS))
    absent, dimension = np.isnan(vectors).any(axis=1), vectors.shape[1]
    halves = np.where(absent[:, None], 0, vectors).astype(np.float16)
    fingerprints = pa.FixedSizeListArray.from_arrays(
        pa.array(halves.ravel()), type=pa.list_(pa.float16(), dimension), mask=pa.array(absent)
    )
    return pa.table([*table.columns, fingerprints], schema=schema(dimension))


def _assess(waiting: dict[int, Sample], found: list[dict], vectors: np.ndarray, judge: Judge) -> None:
    """Write verdicts and fingerprints of the waiting samples (by row) to `found` and `vectors`; clear `waiting`."""
    verdicts, fingerprints = assess(list(waiting.values()), judge)
    for place, verdict, vector in zip(waiting, verdicts, fingerprints):
        columns = asdict(verdict)
        found[place] |= {"verdict": columns.pop("kind")} | columns
        vectors[place] = vector
    waiting.clear()
