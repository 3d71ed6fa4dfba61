"""A killed embed job continues from its committed chunks."""

import signal
import time

import numpy as np
import pyarrow as pa
from support.embedding import LOCAL, make_manifest, rows_by_key, run_on_tars, settings_of
from support.images import write_folder

from attrib.embed import job as embed_job


def vectors_of(rows: dict[str, dict]) -> dict[str, bytes | None]:
    """Bytes of every vector."""
    return {k: r["embedding"] and np.array(r["embedding"], np.float16).tobytes() for k, r in rows.items()}


def chunks_in(output: str) -> list[str]:
    return [
        info.path for info in LOCAL.list_folder(output, recursive=True, suffix=".parquet") if "_chunks" in info.path
    ]


def test_killed_run_resumes_with_identical_vectors(local_ray, s3_endpoint, start_job, tmp_path_factory, tmp_path):
    """The resumed run differs from the reference in image order, storage and number of workers."""
    images, reference = run_on_tars(tmp_path_factory.mktemp("undisturbed"), s3_endpoint, 40)
    expected = rows_by_key(reference)
    write_folder(images, str(tmp_path / "images"), LOCAL)
    make_manifest({"name": "c", "uri": str(tmp_path / "images")}, str(tmp_path / "manifest"), partition_rows=20)
    settings = settings_of(tmp_path, chunk_rows=1, num_workers=2)
    job = start_job("embed", settings.model_dump(mode="json") | {"ray": {"address": local_ray}}, tmp_path)
    deadline = time.monotonic() + 120
    while len(chunks_in(settings.output)) < 5 and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    job.send_signal(signal.SIGKILL)
    _, output = job.communicate()
    assert job.returncode == -signal.SIGKILL, output
    committed = chunks_in(settings.output)
    while time.sleep(2) or chunks_in(settings.output) != committed:  # workers stop shortly after their driver
        committed = chunks_in(settings.output)
    assert 5 <= len(committed) < len(expected), "the run was not interrupted half-way; use more images"

    # Mark committed rows, to detect whether they are computed again.
    marked = set()
    for path in committed:
        chunk = LOCAL.read_table(path)
        marked |= set(chunk["id"].to_pylist())
        LOCAL.write_table(path, chunk.set_column(4, chunk.schema.field("format"), pa.array(["MARKED"] * len(chunk))))
    record = embed_job.run(settings.model_copy(update={"num_workers": 1}))
    rows = rows_by_key(settings)
    assert {row["id"] for row in rows.values() if row["format"] == "MARKED"} == marked
    without_mark = {key: row | {"format": expected[key]["format"]} for key, row in rows.items()}
    assert without_mark == expected and record["num_failed"] == 1
    assert vectors_of(rows) == vectors_of(expected)
