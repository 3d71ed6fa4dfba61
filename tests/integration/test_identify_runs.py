"""jobs.identify on image sets with unreadable or unassessable images, and inside jobs.pipeline."""

import pyarrow as pa
import pytest
from support.generators import drawn_file
from support.identify import STORAGE, TRACES, registered, settings_of
from support.images import pictures, write_folder

from attrib.common.errors import AttribError, FailedShareError
from attrib.common.storage import join
from attrib.data import job as manifest_job
from attrib.data.settings import ManifestSettings
from attrib.generators.identify import job as identify_job
from attrib.pipeline import job as pipeline_job
from attrib.pipeline.settings import PipelineSettings


@pytest.fixture(scope="module")
def registry(tmp_path_factory) -> str:
    return registered(str(tmp_path_factory.mktemp("registry")))


def listed(files: dict[str, bytes], folder) -> dict:
    """The manifest of an image set of these files."""
    write_folder(files, str(folder / "images"), STORAGE)
    collection = {"name": "drawn", "uri": str(folder / "images")}
    manifest_job.run(ManifestSettings(collection=collection, output=str(folder / "manifest")))
    return {"manifest": str(folder / "manifest")}


def test_an_image_set_without_assessable_images_has_no_shares(registry, tmp_path, local_ray, caplog):
    caplog.set_level("INFO")
    made = listed({f"{i}.png": drawn_file("nearest", 600 + i, px=12) for i in range(4)}, tmp_path)
    record = identify_job.run(settings_of(made, registry, str(tmp_path / "out"), prevalence={"num_draws": 100}))
    assert record["shares"] is record["changes"] is record["recognised"] is None and record["abstains"] is None
    assert "no image could be assessed, so the prevalence of generators is not known" in caplog.text
    later = settings_of(
        made, registry, str(tmp_path / "later"), prevalence={"num_draws": 100}, previous=str(tmp_path / "out")
    )
    assert identify_job.run(later)["changes"] is None


def test_after_the_verdicts_of_a_failed_run_are_deleted_images_are_read_again(registry, tmp_path, local_ray):
    """A file is not readable for some time, as can happen with object stores."""
    made = listed({f"{i}.png": drawn_file("nearest", 700 + i) for i in range(4)}, tmp_path)
    aside = (tmp_path / "images" / "2.png").rename(tmp_path / "2.png")
    settings = settings_of(made, registry, str(tmp_path / "out"), max_failed_share=0.01, prevalence={})
    with pytest.raises(
        FailedShareError,
        match=r"1 of 4 images .*; e\.g\. 2\.png: .*\. The reasons of all .* or delete that folder and run again",
    ):
        identify_job.run(settings)
    aside.rename(tmp_path / "images" / "2.png")
    with pytest.raises(FailedShareError):
        identify_job.run(settings)
    STORAGE.delete_folder(join(settings.output, "verdicts"))
    assert identify_job.run(settings)["num_failed"] == 0


def test_a_pipeline_writes_the_generators_to_rows_and_page(registry, tmp_path, local_ray):
    write_folder(pictures([f"s{i}.jpg" for i in range(40)]), str(tmp_path / "sources"), STORAGE)
    generated = {f"{trace}-{i}.png": drawn_file(trace, 500 + i) for trace in TRACES for i in range(6)}
    generated |= {"broken.png": b"\x89PNG\r\n\x1a\n", "tiny.png": drawn_file("nearest", 1, px=12)}
    write_folder(generated, str(tmp_path / "generated"), STORAGE)
    settings = PipelineSettings(
        sources={"name": "sources", "uri": str(tmp_path / "sources")},
        generated={"name": "generated", "uri": str(tmp_path / "generated")},
        backbone={"name": "test_resnet", "weights": "random"},
        max_failed_share=0.5,
        output=str(tmp_path / "run"),
        identify={"registry": registry},
    )
    pipeline_job.run(settings)
    output = join(settings.output, "attributions")
    outcomes = pa.concat_tables(
        [STORAGE.read_table(join(output, "outcomes", name)) for name in STORAGE.names(join(output, "outcomes"))]
    )
    verdicts = {
        row["id"]: row
        for row in STORAGE.read_table(join(settings.output, "generators", "verdicts", "part-00000.parquet")).to_pylist()
    }
    for row in outcomes.to_pylist():
        said = verdicts[row["query_id"]]
        assert [row["generator"], row["generator_verdict"], row["generator_reason"]] == [
            said["generator"], said["verdict"], said["reason"]
        ]  # fmt: skip
        for name in ("score", "margin", "p_value"):
            assert row[f"generator_{name}"] == said[name]
    by_key = {row["query_key"]: row for row in outcomes.to_pylist()}
    assert by_key["broken.png"]["generator_verdict"] == "unassessable" and by_key["broken.png"]["status"] == "failed"
    assert by_key["tiny.png"]["generator_verdict"] == "unassessable" and by_key["tiny.png"]["status"] == "attributed"
    page = STORAGE.read_bytes(join(settings.output, "report.html")).decode()
    assert "consistent with nearest" in page and "Estimated shares" in page and "No verdict proves" in page
    assert "made by" not in page
    write_folder({"more.png": drawn_file("nearest", 900)}, str(tmp_path / "generated"), STORAGE)
    pipeline_job.run(settings.model_copy(update={"rescan": True}))
    again = STORAGE.read_table(join(settings.output, "generators", "verdicts", "part-00000.parquet"))
    assert sorted(again["key"].to_pylist()) == sorted([*generated, "more.png"])


def test_a_pipeline_without_the_column_of_sets_embeds_nothing(registry, tmp_path, local_ray):
    write_folder(pictures(["a.jpg"]), str(tmp_path / "images"), STORAGE)
    settings = PipelineSettings(
        sources={"name": "sources", "uri": str(tmp_path / "images")},
        generated={"name": "generated", "uri": str(tmp_path / "images")},
        backbone={"name": "test_resnet", "weights": "random"},
        output=str(tmp_path / "run"),
        identify={"registry": registry, "prevalence": {"set_column": "account"}},
    )
    with pytest.raises(AttribError, match=r"prevalence\.set_column: .* no metadata column 'account'"):
        pipeline_job.run(settings)
    assert not (tmp_path / "run" / "sources" / "embeddings").exists()
