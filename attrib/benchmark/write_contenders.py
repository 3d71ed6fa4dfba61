"""The plain write that merging, scoring and writing is compared with.

A job's keys: output (of a finished attribution run's rows and outcomes), folder.
"""

import os

import pyarrow as pa
import pyarrow.parquet as pq

from attrib.benchmark.contender import Clock

LAP = "rows"


def plain_write(job: dict, clock: Clock) -> dict:
    """The finished rows, in memory already, as one Parquet file each with the codec that the job uses, and no more."""
    os.makedirs(job["folder"], exist_ok=True)
    tables = {name: _read(os.path.join(job["output"], name)) for name in ("attributions", "outcomes")}
    with clock.lap(LAP):
        for name, table in tables.items():
            pq.write_table(table, os.path.join(job["folder"], f"{name}.parquet"), compression="zstd")
    return {"num_rows": len(tables["attributions"])}


def _read(folder: str) -> pa.Table:
    names = sorted(name for name in os.listdir(folder) if name.endswith(".parquet"))
    return pa.concat_tables([pq.read_table(os.path.join(folder, name)) for name in names])
