"""The second night with the same command: changed collections are noticed, and `rescan` gives their results."""

import re

import pytest
from support.files import not_made
from support.hostile import encode
from support.images import picture

from attrib.common.errors import AttribError, FailedShareError
from attrib.common.run_record import ChangedInputsError
from attrib.common.settings import JobSettings, RescanSettings, StorageSettings
from attrib.common.storage import Storage
from attrib.data import job as manifest_job
from attrib.data.settings import CollectionSettings, ManifestSettings
from attrib.pipeline import job as pipeline_job
from attrib.pipeline.settings import PipelineSettings

LOCAL = Storage(StorageSettings())
FINISHED = "nothing was computed"


def draw(path, seed: int, num_bytes: int = 0) -> None:
    """Write a picture. num_bytes: size of the file; it is padded."""
    path.write_bytes(encode(picture(seed), "PNG").ljust(num_bytes, b"\0"))


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """The folder of two collections, and a run of the first night in `run`."""
    folder = tmp_path_factory.mktemp("nights")
    for role, seeds in (("sources", range(12)), ("generated", range(100, 104))):
        (folder / role).mkdir()
        for seed in seeds:
            draw(folder / role / f"{seed:03}.png", seed, 10_000)
    (folder / "sources" / "broken.png").write_bytes(b"\x89PNG broken")
    (folder / "owners.csv").write_text(
        "key,owner\n" + "".join(f"{seed:03}.png,studio {seed % 3}\n" for seed in range(12))
    )
    return folder


def settings(folder, output: str = "run", **changes) -> PipelineSettings:
    values = {
        "sources": {"name": "s", "uri": str(folder / "sources"), "metadata": {"uri": str(folder / "owners.csv")}},
        "generated": {"name": "g", "uri": str(folder / "generated")},
        "output": str(folder / output),
        "backbone": {"name": "test_resnet", "weights": "random"},
        "max_failed_share": 0.2,
        "embed": {"num_workers": 1},
    }
    return PipelineSettings(**values | changes)


def results(folder, output: str) -> dict:
    """Rows and outcomes of a run."""
    found = {}
    for kind in ("attributions", "outcomes"):
        uri = str(folder / output / "attributions" / kind)
        [name] = LOCAL.names(uri, suffix=".parquet")
        found[kind] = LOCAL.read_table(f"{uri}/{name}")
    return found


def add_a_source(folder) -> None:
    draw(folder / "sources" / "new.png", 100)  # equals a generated image


def change_a_source_in_place(folder) -> None:
    """Of the same size, so that its time alone tells."""
    draw(folder / "sources" / "003.png", 101, 10_000)


def add_a_source_and_change_the_metadata(folder) -> None:
    add_a_source(folder)
    (folder / "owners.csv").write_text((folder / "owners.csv").read_text().replace("studio 1", "atelier 1"))


@pytest.mark.timeout(600)  # nine runs of all stages
def test_each_change_is_noticed_and_rescan_gives_the_results_of_a_fresh_run(local_ray, night):
    first = pipeline_job.run(settings(night))
    assert FINISHED not in first
    assert first["sources"].startswith("13 listed, 1 could not be read and cannot be found (")
    assert first["sources"].endswith("sources/embeddings/failures.parquet)")
    page = (night / "run" / "report.html").read_text()
    assert "1 of 13 listed sources could not be read and cannot be found" in page
    assert pipeline_job.run(settings(night))[FINISHED].startswith("finished before, at ")
    before = results(night, "run")
    changes = [
        (change_a_source_in_place, "some of its 13 files have another size or time"),
        (add_a_source_and_change_the_metadata, "it had 13 files and has 14"),
    ]
    for number, (change, message) in enumerate(changes):
        change(night)
        with pytest.raises(ChangedInputsError, match=f"{message}; use --set rescan=true.*or choose another output"):
            pipeline_job.run(settings(night))
        assert results(night, "run") == before
        again = pipeline_job.run(settings(night, rescan=True))
        assert FINISHED not in again and again["sources"].startswith(f"{13 + number} listed, 1 could not be read")
        pipeline_job.run(settings(night, f"fresh-{number}"))
        before = results(night, "run")
        assert before == results(night, f"fresh-{number}")
    assert FINISHED in pipeline_job.run(settings(night, rescan=True))
    best = before["attributions"].filter(before["attributions"]["rank"].to_numpy() == 1).to_pylist()
    sources = {row["query_key"]: row["source_key"] for row in best}
    assert (sources["100.png"], sources["101.png"]) == ("new.png", "003.png")
    assert "atelier 1" in before["attributions"]["source_owner"].to_pylist()
    stages = [stage for stage in settings(night).stages().values() if isinstance(stage, RescanSettings)]
    assert len(stages) == 6 and [not_made(stage) for stage in stages] == [[]] * 6


def test_a_batch_without_enough_vectors_names_the_first_and_is_retried_after_repair(local_ray, night):
    (night / "few").mkdir()
    draw(night / "few" / "whole.png", 0)
    broken = [night / "few" / f"broken {number}.png" for number in range(4)]
    for file in broken:
        file.write_bytes(b"\x89PNG broken")
    few, embed = {"name": "few", "uri": str(night / "few")}, {"num_workers": 1, "max_failed_share": 1.0}
    with pytest.raises(FailedShareError, match="4 of 5 queries could not be embedded") as caught:
        pipeline_job.run(settings(night, "few-run", generated=few, embed=embed))
    said = str(caught.value)
    assert said.count("broken ") == 3 and re.search(r"e\.g\. broken \d\.png: \S", said)
    assert f"{night}/few-run/generated/embeddings/failures.parquet lists them all" in said
    for number, file in enumerate(broken):
        draw(file, number)
    with pytest.raises(ChangedInputsError, match="some of its 5 files have another size or time"):
        pipeline_job.run(settings(night, "few-run", generated=few, embed=embed))
    first = LOCAL.read_json(str(night / "few-run" / "generated" / "manifest" / "manifest.json"))
    retry = embed | {"retry_failed": True}
    summary = pipeline_job.run(settings(night, "few-run", generated=few, embed=retry, rescan=True))
    assert summary["generated images"] == "5 (0 failed)"
    assert LOCAL.read_json(str(night / "few-run" / "generated" / "manifest" / "manifest.json")) == first


def test_a_pipeline_that_is_refused_before_any_work_leaves_its_output_free(local_ray, night):
    wrong = {"weights": "absent.safetensors"}
    with pytest.raises(AttribError, match=r"absent.safetensors does not exist; correct backbone.weights"):
        pipeline_job.run(settings(night, "refused", backbone={"name": "test_resnet"} | wrong))
    assert not (night / "refused").exists()
    with pytest.raises(AttribError, match=r"report.roll_up: the sources have no metadata column 'licence'.*owner"):
        pipeline_job.run(settings(night, "refused", report={"roll_up": ["licence"]}))
    pipeline_job.run(settings(night, "refused", report={"roll_up": ["owner"]}))


def test_an_inner_manifest_of_a_job_without_rescan_advises_another_output_alone(local_ray, tmp_path):
    draw(tmp_path / "0.png", 0)
    collection, job = (
        CollectionSettings(name="c", uri=str(tmp_path)),
        InnerSettings(output=str(tmp_path.parent / "inner")),
    )
    output = str(tmp_path.parent / "inner" / "photographs")
    assert manifest_job.list_collection(collection, output, job).num_images == 1
    assert manifest_job.list_collection(collection, output, job).num_images == 1
    draw(tmp_path / "1.png", 1)
    with pytest.raises(AttribError, match="it had 1 files and has 2; choose another output folder") as caught:
        manifest_job.list_collection(collection, output, job)
    assert "rescan" not in str(caught.value)


class InnerSettings(JobSettings):
    output: str


def test_files_repaired_in_place_are_no_change_for_a_retry(local_ray, tmp_path):
    draw(tmp_path / "0.png", 0)
    given = ManifestSettings(collection={"name": "c", "uri": str(tmp_path)}, output=str(tmp_path.parent / "repaired"))
    manifest_job.run(given)
    draw(tmp_path / "0.png", 1, 9_000)
    assert manifest_job.run(given, ignore_versions=True)["num_images"] == 1
    with pytest.raises(ChangedInputsError):
        manifest_job.run(given)
    draw(tmp_path / "1.png", 1)
    with pytest.raises(ChangedInputsError):
        manifest_job.run(given, ignore_versions=True)
