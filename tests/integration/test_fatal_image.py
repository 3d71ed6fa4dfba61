"""An image that kills the process that decodes it costs a worker and one row, not the job."""

from support.embedding import LOCAL, make_manifest, rows_by_key, settings_of
from support.fatal import FATAL_END, write_sitecustomize
from support.images import pictures, write_folder

from attrib.common.storage import join


def test_fatal_images_become_failures_and_the_job_ends(start_job, tmp_path):
    images = pictures(f"{number:02}.png" for number in range(40))
    fatal = {"07.png", "08.png", "31.png"}
    images |= {key: images[key] + FATAL_END for key in fatal}
    write_folder(images, str(tmp_path / "images"), LOCAL)
    make_manifest({"name": "c", "uri": str(tmp_path / "images")}, str(tmp_path / "manifest"))
    settings = settings_of(tmp_path, chunk_rows=10, num_workers=1)
    values = settings.model_dump(mode="json") | {"ray": {"num_cpus": 1, "object_store_gib": 0.25}}
    job = start_job("embed", values, tmp_path, PYTHONPATH=write_sitecustomize(tmp_path / "site"))
    _, errors = job.communicate(timeout=240)
    assert job.returncode == 0, errors
    rows = rows_by_key(settings)
    assert {key: row["reason"] for key, row in rows.items() if row["stage"]} == dict.fromkeys(
        fatal, "the decoder process died"
    )
    assert LOCAL.read_json(join(settings.output, "embeddings.json"))["num_failed"] == 3
    assert all(row["embedding"] for key, row in rows.items() if key not in fatal)
