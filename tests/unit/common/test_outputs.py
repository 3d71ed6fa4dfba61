"""The output folder of a job: what is there stays, unless the job made it."""

import json

import pytest

from attrib.common.errors import AttribError
from attrib.common.lease import WRITER
from attrib.common.outputs import STARTED, SUBMITTED, check_output_file, input_uris
from attrib.common.run_record import rewriting, run_once
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage
from attrib.evaluate.settings import EvaluateSettings
from attrib.pages.render import MARK
from attrib.train.settings import TrainSettings

LOCAL = Storage(StorageSettings())
RECORD = "train.json"


def settings(output, **changes) -> TrainSettings:
    return TrainSettings(**{"manifest": "m", "output": str(output), "backbone": {"name": "x"}} | changes)


def train(output, **changes):
    return run_once(settings(output, **changes), RECORD, {}, LOCAL, dict)


def listed(folder) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def test_a_folder_with_files_of_the_user_is_refused_and_untouched(tmp_path):
    (tmp_path / "mine.parquet").write_text("x")
    with pytest.raises(AttribError, match=r"holds files that this job did not make \(mine.parquet\)"):
        train(tmp_path)
    assert listed(tmp_path) == {"mine.parquet"}


@pytest.mark.parametrize("content", ["my novel", "{}", "[]"])
def test_a_file_of_the_user_with_the_name_of_a_lease_stays(content, tmp_path):
    (tmp_path / WRITER).write_text(content)
    with pytest.raises(AttribError, match=r"did not make \(writer.json\)"):
        train(tmp_path)
    assert (tmp_path / WRITER).read_text() == content and listed(tmp_path) == {WRITER}


def test_a_run_of_another_job_is_refused_and_untouched(tmp_path):
    train(tmp_path)
    before = (tmp_path / STARTED).read_bytes()
    other = EvaluateSettings(
        methods=[{"name": "a", "sources": "/s", "queries": "/q"}],
        truth={"uri": "/t.tsv", "key_column": "query"},
        output=str(tmp_path),
    )
    with pytest.raises(AttribError, match="holds a run of another job"), rewriting(other, LOCAL):
        pytest.fail("must not begin")
    earlier = json.loads(before)
    del earlier["job"], earlier["record_sha256"]  # as in records of earlier versions
    for started in (before, json.dumps(earlier).encode()):
        (tmp_path / STARTED).write_bytes(started)
        (tmp_path / RECORD).unlink(missing_ok=True)
        with pytest.raises(AttribError, match="holds a run of another job"):
            run_once(other, "other.json", {}, LOCAL, lambda: pytest.fail("must not begin"), resumable=False)
        assert listed(tmp_path) == {STARTED} and (tmp_path / STARTED).read_bytes() == started
    assert train(tmp_path)["identity"]


def test_a_job_that_computes_anew_leaves_its_folder_free_if_it_is_refused(tmp_path):
    with pytest.raises(AttribError, match="no"), rewriting(settings(tmp_path), LOCAL):
        raise AttribError("no")
    assert listed(tmp_path) == set()


@pytest.mark.parametrize(("output", "kind"), [("file", "not a folder"), ("link", "a link to nothing")])
def test_what_is_no_folder_is_named(output, kind, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for place in (output, f"{output}/new/run"):
        with pytest.raises(AttribError, match=f"output .*{place}: .*/{output} is {kind}; choose"):
            train(tmp_path / place)


def test_an_empty_folder_is_taken(tmp_path):
    assert train(tmp_path)["identity"]


@pytest.mark.parametrize(
    ("output", "relation"), [("in", "equals"), ("", "contains"), ("in/deep/out", "lies inside"), ("link", "equals")]
)
def test_an_output_that_overlaps_with_an_input_is_refused(output, relation, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(AttribError, match=f"{relation} the input manifest"):
        train(tmp_path / output, manifest=str(tmp_path / "in"))


def test_a_submitted_job_writes_to_a_local_disk_only_if_it_is_said_to_be_shared(tmp_path, monkeypatch):
    monkeypatch.setenv(SUBMITTED, "{}")
    with pytest.raises(AttribError, match="may be gone when the submitted job ends; give an s3:// URI"):
        train(tmp_path)
    assert train(tmp_path, storage={"local_is_shared": True})["identity"]


def test_a_page_of_someone_else_is_not_overwritten(tmp_path):
    mine, ours = tmp_path / "mine.html", tmp_path / "ours.html"
    mine.write_text("<!doctype html><p>mine")
    ours.write_bytes(b"<!doctype html><meta " + MARK + b"'>")
    check_output_file(str(ours), MARK, LOCAL)
    check_output_file(str(tmp_path / "absent.html"), MARK, LOCAL)
    with pytest.raises(AttribError, match="is a file that this job did not make"):
        check_output_file(str(mine), MARK, LOCAL)


def test_a_name_that_begins_alike_is_another_folder(tmp_path):
    (tmp_path / "in").mkdir()
    assert train(tmp_path / "in2", manifest=str(tmp_path / "in"))


def test_every_uri_of_nested_settings_is_an_input():
    values = {"sources": "/s", "queries": "/q", "mapper": "/m"}
    given = EvaluateSettings(
        methods=[{"name": "a", **values}], truth={"uri": "/t.tsv", "key_column": "query"}, output="/out"
    )
    assert {uri for _, uri in input_uris(given)} == {"/s", "/q", "/m", "/t.tsv"}


@pytest.mark.parametrize("output", ["s3://b/x/../in", "s3://b//in", "s3://b/./in"])
def test_a_prefix_that_clients_take_for_another_is_refused(output):
    with pytest.raises(AttribError, match=r"a prefix must not have an empty part, \. or \.\."):
        run_once(settings(output, manifest="s3://b/in"), RECORD, {}, LOCAL, dict)
