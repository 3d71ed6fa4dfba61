"""One output folder, one run: refusals, leases and what a failed start leaves behind."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time

import pytest

from attrib.common import lease as leases
from attrib.common import scratch
from attrib.common.errors import AttribError
from attrib.common.lease import WRITER, Lease
from attrib.common.run_record import STARTED, ChangedInputsError, FinishedRecord, run_once
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage
from attrib.common.swap import read_or_none, swap
from attrib.embed.settings import EmbedSettings
from attrib.train.settings import TrainSettings

LOCAL = Storage(StorageSettings())
RECORD = "train.json"
EMBEDDED = "embeddings.json"


def settings(output, **changes) -> TrainSettings:
    return TrainSettings(**{"manifest": "m", "output": str(output), "backbone": {"name": "x"}} | changes)


def train(output, work=dict, digest="d", **changes):
    return run_once(settings(output, **changes), RECORD, {"manifest": digest}, LOCAL, work)


def interrupted(output, name="part.bin"):
    """A run that has written a file and then fails."""

    def work():
        (output / name).write_text("x")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(output, work)


def listed(folder) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def test_other_settings_are_named_by_the_keys_that_differ(tmp_path):
    interrupted(tmp_path)
    with pytest.raises(AttribError) as caught:
        train(tmp_path, digest="other", optimiser={"batch_size": 32}, seed=1)
    differences = "(optimiser.batch_size: there 256, now 32; seed: there 0, now 1; input manifest)"
    assert f"{tmp_path} belongs to a run with other settings or inputs {differences}; choose" in str(caught.value)


def test_a_finished_run_is_returned_and_says_so(tmp_path, caplog):
    caplog.set_level("INFO")
    first = train(tmp_path, lambda: {"loss": 1.0})
    again = train(tmp_path, lambda: pytest.fail("computed again"))
    assert again == first and isinstance(again, FinishedRecord) and "manifest" in again.made_from
    assert f"finished before, at {first['written_at']}, from manifest" in caplog.text
    assert listed(tmp_path) == {STARTED, RECORD}


def test_an_unfinished_run_is_continued(tmp_path):
    interrupted(tmp_path)
    assert listed(tmp_path) == {STARTED, "part.bin"}
    assert train(tmp_path, lambda: {"loss": 1.0})["loss"] == 1.0


def test_a_job_that_fails_before_it_wrote_anything_leaves_its_folder_free(tmp_path):
    with pytest.raises(AttribError, match="too large"):
        train(tmp_path / "out", lambda: (_ for _ in ()).throw(AttribError("too large")))
    assert train(tmp_path / "out", seed=7)["settings"]["seed"] == 7


OTHER_TYPES = '{"identity": "x", "inputs": "x", "settings": {}, "written_at": "x"}'


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"identity"', "\x00\x01", OTHER_TYPES])
@pytest.mark.parametrize("name", [RECORD, STARTED])
def test_a_damaged_record_is_one_clear_error(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(AttribError, match=f"{name} is damaged.*restore it"):
        train(tmp_path)


def embed(output, work=dict, manifest="d", change=None, **changes):
    """A run of a job that has `rescan`."""
    values = {"manifest": "m", "output": str(output), "backbone": {"name": "x"}} | changes
    return run_once(EmbedSettings(**values), EMBEDDED, {"manifest": manifest}, LOCAL, work, change=change)


MADE = ("part-00000.parquet", "failures.parquet", "_chunks/part-00000/rows.parquet")
MINE = ("notes.txt", "part-00000-mine.parquet", "part-1.parquet", "mine/part-00000.parquet")


@pytest.fixture
def embedded(tmp_path):
    """The output of a finished run, with files of the user."""

    def work():
        for name in (*MADE, *MINE):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("x")
        return {}

    embed(tmp_path, work)
    return tmp_path


def files_in(folder) -> set[str]:
    """Relative paths of the files that are not hidden."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in paths if not path.name.startswith(".")}


class TestRescan:
    """Inputs that changed since a run."""

    def test_without_it_the_job_stops_and_names_it(self, embedded):
        before = files_in(embedded)
        with pytest.raises(ChangedInputsError) as caught:
            embed(embedded, manifest="other")
        said = str(caught.value)
        assert "other settings or inputs (input manifest), of 20" in said
        assert "use --set rescan=true to delete these results and make them again, or choose another output" in said
        assert files_in(embedded) == before

    def test_with_it_the_results_of_the_job_alone_are_deleted_and_made_again(self, embedded, caplog):
        caplog.set_level("INFO")

        def work():
            assert files_in(embedded) == {STARTED, WRITER, *MINE}
            return {"again": True}

        record = embed(embedded, work, manifest="other", rescan=True)
        assert record["again"] and record["inputs"] == {"manifest": "other"}
        assert "its results are deleted and made again" in caplog.text
        assert isinstance(embed(embedded, manifest="other"), FinishedRecord)

    def test_the_files_of_an_unfinished_run_are_deleted_too(self, embedded):
        (embedded / EMBEDDED).unlink()
        with pytest.raises(ChangedInputsError):
            embed(embedded, manifest="other")
        embed(embedded, manifest="other", rescan=True)
        assert files_in(embedded) == {EMBEDDED, STARTED, *MINE}

    def test_unchanged_inputs_are_not_computed_again(self, embedded):
        assert isinstance(embed(embedded, rescan=True), FinishedRecord)
        assert files_in(embedded) == {EMBEDDED, STARTED, *MADE, *MINE}

    def test_other_settings_are_refused_all_the_same(self, embedded):
        with pytest.raises(
            AttribError, match=r"chunk_rows: there 128, now 9.*rescan=true replaces results of the same"
        ):
            embed(embedded, manifest="other", rescan=True, chunk_rows=9)
        assert files_in(embedded) >= {EMBEDDED, *MADE}

    def test_jobs_without_it_do_not_advise_it(self, tmp_path):
        train(tmp_path)
        with pytest.raises(AttribError, match="input manifest") as caught:
            train(tmp_path, digest="other")
        assert "rescan" not in str(caught.value)

    def test_an_input_that_is_gone_is_named(self, tmp_path):
        train(tmp_path)
        with pytest.raises(AttribError, match=r"\(input manifest\)"):
            run_once(settings(tmp_path), RECORD, {}, LOCAL, dict)

    @pytest.mark.parametrize("name", [EMBEDDED, *MADE])
    def test_a_run_that_is_killed_while_it_deletes_leaves_nothing_that_is_taken_for_a_result(
        self, name, embedded, monkeypatch
    ):
        def delete(kind):
            def until_killed(self, uri):
                if uri.endswith(name.split("/")[0]):
                    raise KeyboardInterrupt
                kind(self, uri)

            return until_killed

        with monkeypatch.context() as patched:
            for kind in ("delete_file", "delete_folder"):
                patched.setattr(Storage, kind, delete(getattr(Storage, kind)))
            with pytest.raises(KeyboardInterrupt):
                embed(embedded, lambda: pytest.fail("computed"), manifest="other", rescan=True)
        assert name in files_in(embedded) and (EMBEDDED in files_in(embedded)) == (name == EMBEDDED)
        with pytest.raises(ChangedInputsError):
            embed(embedded, manifest="other")
        embed(embedded, manifest="other", rescan=True)
        assert files_in(embedded) == {EMBEDDED, STARTED, *MINE}

    def test_a_change_that_no_digest_tells_is_found_by_comparison(self, embedded):
        seen = []

        def change(record):
            seen.append(record["written_at"])
            return "one file more"

        with pytest.raises(ChangedInputsError, match=r"was made at 20.*: one file more; use --set rescan=true"):
            embed(embedded, change=change)
        assert len(seen) == 1
        embed(embedded, change=change, rescan=True)
        assert files_in(embedded) == {EMBEDDED, STARTED, *MINE}


def hold(output: str, seconds: float, started) -> None:
    with Lease(output, LOCAL, seconds):
        started.set()
        time.sleep(60)


@pytest.fixture
def other_driver(tmp_path):
    """A process that holds the lease of a folder."""
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    process = context.Process(target=hold, args=(str(tmp_path), 0.4, started))
    process.start()
    assert started.wait(60)
    yield process
    process.kill()
    process.join()


class TestLease:
    def test_a_second_driver_stops_and_names_the_first(self, other_driver, tmp_path):
        with pytest.raises(AttribError, match=f"is being written by the driver with process {other_driver.pid} on"):
            train(tmp_path)
        assert STARTED not in listed(tmp_path)

    def test_the_lease_of_a_killed_driver_on_this_machine_is_taken_over_at_once(self, other_driver, tmp_path):
        other_driver.kill()
        other_driver.join()
        assert WRITER in listed(tmp_path)
        before = time.monotonic()
        assert train(tmp_path)["identity"] and WRITER not in listed(tmp_path)
        assert time.monotonic() - before < leases.LEASE_SECONDS / 2

    def test_a_run_that_finds_its_work_done_deletes_the_lease_of_a_dead_driver(self, other_driver, tmp_path):
        """The driver was killed between its last record and the end of its lease."""
        undisturbed = tmp_path / "undisturbed"
        train(undisturbed)
        shutil.copy(tmp_path / WRITER, undisturbed)
        train(undisturbed)
        assert WRITER in listed(undisturbed), "its driver lives"
        other_driver.kill()
        other_driver.join()
        left = undisturbed / f".part.{scratch._mark(other_driver.pid)}-12345678.tmp"
        left.touch()
        assert isinstance(train(undisturbed), FinishedRecord)
        assert listed(undisturbed) == {STARTED, RECORD} and not left.exists()

    def test_the_lease_of_a_driver_elsewhere_stays_with_work_that_is_done(self, tmp_path):
        train(tmp_path)
        (tmp_path / WRITER).write_text(json.dumps(elsewhere() | {"since": "now", "renewals": 0}))
        assert isinstance(train(tmp_path), FinishedRecord) and WRITER in listed(tmp_path)

    def test_a_driver_elsewhere_is_alive_while_it_renews_its_lease(self, other_driver, tmp_path, monkeypatch):
        monkeypatch.setattr(leases, "this_process", elsewhere)
        with pytest.raises(AttribError, match="is being written by"):
            Lease(str(tmp_path), LOCAL, 5.0).__enter__()

    def test_a_driver_elsewhere_that_no_longer_renews_is_dead(self, tmp_path, monkeypatch, caplog):
        with monkeypatch.context() as patched:
            patched.setattr(leases, "this_process", elsewhere)
            abandoned = Lease(str(tmp_path), LOCAL)
            assert swap(abandoned.uri, abandoned._content(), None, LOCAL)
        with Lease(str(tmp_path), LOCAL, 0.3) as lease:
            lease.check()
        assert "no longer writes here" in caplog.text and WRITER not in listed(tmp_path)

    def test_a_driver_whose_lease_was_taken_writes_no_record(self, tmp_path):
        def work():
            (tmp_path / WRITER).write_text(json.dumps(elsewhere() | {"since": "now", "renewals": 0}))
            return {}

        with pytest.raises(AttribError, match="was taken over by another driver"):
            train(tmp_path, work)
        assert RECORD not in listed(tmp_path) and WRITER in listed(tmp_path)

    def test_a_damaged_lease_is_taken_over(self, tmp_path):
        (tmp_path / WRITER).write_text("{")
        with Lease(str(tmp_path), LOCAL, 0.2) as lease:
            lease.check()


def elsewhere() -> dict:
    return {"machine": "another", "namespace": "", "pid": os.getpid(), "started": 1}


COUNT = """
import sys
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage
from attrib.common.swap import read_or_none, swap
local, uri = Storage(StorageSettings()), sys.argv[1]
for _ in range(50):
    read = read_or_none(uri, local)
    while not swap(uri, b"%d" % (int(read or 0) + 1), read, local):
        read = read_or_none(uri, local)
"""


def test_of_many_writers_exactly_one_swaps(tmp_path):
    uri = str(tmp_path / "number")
    writers = [subprocess.Popen([sys.executable, "-c", COUNT, uri]) for _ in range(4)]
    assert [writer.wait(60) for writer in writers] == [0] * 4
    assert read_or_none(uri, LOCAL) == b"200"
