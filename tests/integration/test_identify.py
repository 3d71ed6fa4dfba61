"""The identify job on simulated generators: verdicts on every kind of input, restarts, and the summary."""

import os
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from support.files import not_made
from support.generators import drawn_file, drawn_samples, spectrum_method
from support.hostile import hostile_images
from support.identify import STORAGE, TRACES, registered, settings_of
from support.images import write_folder

from attrib.common.config import digest
from attrib.common.errors import AttribError, FailedShareError, MismatchError
from attrib.common.storage import bytes_sha256, join
from attrib.data import job as manifest_job
from attrib.data.manifest import Slice, open_manifest
from attrib.data.settings import ManifestSettings
from attrib.generators.identify import job as identify_job
from attrib.generators.identify.files import (
    block_verdicts,
    check_same_images,
    open_identified,
    read_fingerprints,
    schema,
)
from attrib.generators.identify.prevalence import OTHER
from attrib.generators.identify.settings import IdentifySettings
from attrib.generators.identify.summary import SET_SCHEMA, Tally
from attrib.generators.registry.registry import open_registry, register, remove

COUNTS = {"nearest": 30, "checker": 12, "diagonal": 25, None: 9}  # diagonal is not registered


@pytest.fixture(scope="module")
def registry(tmp_path_factory) -> str:
    return registered(str(tmp_path_factory.mktemp("registry")))


@pytest.fixture(scope="module")
def image_set(tmp_path_factory, local_ray) -> dict:
    """A manifest of drawn images, each with an account, and of hostile files."""
    root = str(tmp_path_factory.mktemp("dump"))
    files, accounts = {}, {}
    for trace, count in COUNTS.items():
        for i in range(count):
            key = f"{trace}-{i:02d}.png"
            files[key] = drawn_file(trace, 300 + i)
            accounts[key] = f"account of {trace}"
    files["jpeg.jpg"] = drawn_file("nearest", 400, format="JPEG", quality=85)
    files["small.png"] = drawn_file("nearest", 401, px=12)
    bad = {
        f"bad/{name}": data
        for name, (data, _) in hostile_images().items()
        if "." in name and not name.endswith((".zip", ".svg", ".mpo"))
    }
    write_folder(files | bad, join(root, "images"), STORAGE)
    lines = ["key,account", *(f"{key},{account}" for key, account in accounts.items())]
    STORAGE.write_bytes(join(root, "accounts.csv"), "\n".join(lines).encode())
    collection = {"name": "dump", "uri": join(root, "images"), "metadata": {"uri": join(root, "accounts.csv")}}
    for name, partition_rows in (("manifest", 60), ("one-part", 1000)):
        manifest_job.run(
            ManifestSettings(collection=collection, output=join(root, name), partition_rows=partition_rows)
        )
    return {"root": root, "manifest": join(root, "manifest"), "num_images": len(files) + len(bad)}


@pytest.fixture(scope="module")
def one_part(image_set) -> dict:
    """The same images in one partition, which one worker reads: processes take most of the time of these tests."""
    return image_set | {"manifest": join(image_set["root"], "one-part")}


@pytest.fixture(scope="module")
def finished(image_set, registry, tmp_path_factory) -> IdentifySettings:
    settings = settings_of(image_set, registry, str(tmp_path_factory.mktemp("finished") / "out"))
    identify_job.run(settings)
    return settings


def verdicts_of(settings: IdentifySettings) -> pa.Table:
    folder = join(settings.output, "verdicts")
    return pa.concat_tables([STORAGE.read_table(join(folder, name)) for name in STORAGE.names(folder)])


def test_every_image_has_one_verdict_and_bad_input_a_reason(finished, image_set):
    assert not_made(finished) == []
    table = verdicts_of(finished)
    assert len(table) == image_set["num_images"] == len(pc.unique(table["id"]))
    assert table.schema.equals(schema(table.schema.field("fingerprint").type.list_size))
    rows = {row["key"]: row for row in table.to_pylist()}
    expected = {f"bad/{name}": reason for name, (_, reason) in hostile_images().items() if f"bad/{name}" in rows}
    for key, reason in expected.items():
        row = rows[key]
        if reason is not None:
            assert row["verdict"] == "unassessable" and row["stage"] == "decode" and reason in row["reason"], key
            assert row["fingerprint"] is None and row["score"] is None and row["generator"] is None
    assert rows["bad/one_pixel.png"]["verdict"] == "unassessable" and "too small" in rows["bad/one_pixel.png"]["reason"]
    assert rows["small.png"]["reason"].startswith("too small: 12x12")
    for trace in TRACES:
        own = [rows[f"{trace}-{i:02d}.png"] for i in range(COUNTS[trace])]
        assert sum(row["verdict"] == "known" and row["generator"] == trace for row in own) >= 0.8 * len(own)
    assert rows["jpeg.jpg"]["generator"] == "nearest" and rows["jpeg.jpg"]["gallery"] == "jpeg-85"
    others = [row for key, row in rows.items() if key.startswith(("diagonal", "None"))]
    assert sum(row["verdict"] == "unknown" for row in others) >= 0.8 * len(others)
    vectors = read_fingerprints(table.filter(pc.is_valid(table["fingerprint"])))
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)


def test_sets_and_shares_count_all_images_of_a_gallery_whatever_their_own_verdicts(finished, one_part, tmp_path):
    """Images that are unassessable because few references are recognised count, too: the others are a biased sample."""
    strict = finished.model_copy(
        update={
            "output": str(tmp_path / "strict"),
            "manifest": one_part["manifest"],
            "chunk_rows": 1000,
            "verdicts": finished.verdicts.model_copy(update={"least_recognised": 1.0}),
        }
    )
    identify_job.run(strict)
    first, second = (open_identified(settings.output, STORAGE).record for settings in (finished, strict))
    assert second["verdicts"]["unassessable"] > first["verdicts"]["unassessable"] + 20
    assert second["verdicts"]["known"] == first["verdicts"]["known"]
    rows = verdicts_of(strict).to_pylist()
    assert second["num_share_images"] == first["num_share_images"] == sum(row["gallery"] is not None for row in rows)
    of_both = zip(first["shares"], second["shares"])
    assert all(a["share"] == b["share"] and a["num_images"] == b["num_images"] for a, b in of_both)
    sets = [STORAGE.read_table(join(settings.output, "sets.parquet")) for settings in (finished, strict)]
    assert sets[0].equals(sets[1]) and len(sets[0])


def test_the_record_holds_shares_candidates_and_sets(finished):
    record = open_identified(finished.output, STORAGE).record
    assert sum(record["verdicts"].values()) == record["num_images"] and record["abstains"] is None
    shares = {share["name"]: share for share in record["shares"]}
    assessed = record["num_images"] - record["verdicts"]["unassessable"]
    for trace in TRACES:
        assert shares[trace]["low"] <= COUNTS[trace] / assessed <= shares[trace]["high"]
    assert record["changes"] is None and record["negatives"] == {"photographs": 50, "generators": 50}
    # The hostile files are variants of one image, so they form a candidate.
    shown = [[exemplar["key"] for exemplar in candidate["exemplars"]] for candidate in record["candidates"]]
    assert any(len(keys) == 12 and all(key.startswith("diagonal") for key in keys) for keys in shown)
    sizes = [candidate["num_images"] for candidate in record["candidates"]]
    assert sizes == sorted(sizes, reverse=True) and min(c["num_distinct"] for c in record["candidates"]) >= 10
    members = STORAGE.read_table(join(finished.output, "candidates.parquet")).to_pylist()
    assert [sum(m["candidate"] == c["name"] for m in members) for c in record["candidates"]] == sizes
    exemplars = {(c["name"], exemplar["id"]) for c in record["candidates"] for exemplar in c["exemplars"]}
    assert exemplars and exemplars <= {(m["candidate"], m["id"]) for m in members}
    sets = STORAGE.read_table(join(finished.output, "sets.parquet"))
    assert sets.schema.equals(SET_SCHEMA)
    verdicts = {row["name"]: row for row in sets.to_pylist()}
    assert (
        verdicts["account of nearest"]["generator"] == "nearest"
        and verdicts["account of checker"]["generator"] == "checker"
    )
    assert (
        verdicts["account of diagonal"]["verdict"] == "unknown" and verdicts["account of None"]["verdict"] == "unknown"
    )
    assert record["sets"]["num_sets"] == 4
    listed = record["sets"]["listed"]
    assert sorted(listed, key=lambda row: row["name"]) == sets.sort_by("name").to_pylist()
    assert [row["p_value"] for row in listed] == sorted(row["p_value"] for row in listed)
    assert all(row["num_distinct"] == row["num_images"] for row in listed)
    # With two generators, leaving one out leaves no generated negatives for the other.
    assert set(record["recognised"]) == set(TRACES) and record["left_out_rates"] == {}
    assert any("JPEG" in warning or "BMP" in warning for warning in record["warnings"])


def test_reasons_that_differ_only_in_sizes_are_grouped(finished):
    record = open_identified(finished.output, STORAGE).record
    reasons = {row["reason"]: row for row in record["unassessable_reasons"]}
    assert sum(row["count"] for row in reasons.values()) == record["verdicts"]["unassessable"]
    table = verdicts_of(finished)
    small = [reason for reason in table["reason"].to_pylist() if reason and reason.startswith("too small:")]
    assert len(set(small)) > 1 and reasons["too small"]["count"] == len(small)
    assert reasons["too small"]["example"] in small and not any(":" in reason for reason in reasons)
    many = Tally(
        reasons=Counter({f"r{i:02d}": 100 - i for i in range(23)}), examples={f"r{i:02d}": "" for i in range(23)}
    )
    described = many.described_reasons()
    assert [row["reason"] for row in described][-2:] == ["r19", "3 other reasons"] and described[-1][
        "count"
    ] == 80 + 79 + 78


def test_a_restart_continues_and_gives_the_same_verdicts(finished, image_set, registry, tmp_path, caplog):
    caplog.set_level("INFO")
    settings = settings_of(image_set, registry, str(tmp_path / "out"), chunk_rows=10)
    identify_job.run(settings)
    first = verdicts_of(settings)
    assert first.equals(verdicts_of(finished))  # for every chunk size
    kept = join(settings.output, "verdicts", "part-00000.parquet")
    inode = os.stat(kept).st_ino
    STORAGE.delete_file(join(settings.output, "generators.json"))
    STORAGE.delete_file(join(settings.output, "verdicts", "part-00001.parquet"))
    record = identify_job.run(settings)
    assert os.stat(kept).st_ino == inode and verdicts_of(settings).equals(first)
    assert "resuming, 70 of 130 images" in caplog.text
    assert identify_job.run(settings) == record
    folder = join(settings.output, "verdicts")
    assert record["digest"] == digest(
        [bytes_sha256(STORAGE.read_bytes(join(folder, name))) for name in STORAGE.names(folder)]
    )
    assert not STORAGE.exists(join(settings.output, "_chunks"))
    with pytest.raises(AttribError, match="belongs to a run with other settings"):
        identify_job.run(settings_of(image_set, registry, settings.output, verdicts={"false_attribution_rate": 0.1}))


def test_the_change_since_an_earlier_run_is_reported(finished, one_part, registry, tmp_path):
    settings = settings_of(one_part, registry, str(tmp_path / "out"), previous=finished.output, chunk_rows=1000)
    record = identify_job.run(settings)
    assert [row["name"] for row in record["changes"]] == [share["name"] for share in record["shares"]]
    assert not any(row["changed"] or row["note"] for row in record["changes"])
    assert not any("another registry" in warning for warning in record["warnings"])


def test_runs_of_two_registries_are_compared_for_common_generators(finished, one_part, registry, tmp_path):
    """Between the runs diagonal is registered and checker removed, so "unknown generator" has another meaning."""
    method = spectrum_method()
    other = str(tmp_path / "registry")
    shutil.copytree(registry, other)
    held, _ = register(
        open_registry(other, STORAGE), "diagonal", "generator", [drawn_samples("diagonal", range(25))], method, STORAGE
    )
    remove(held, "checker", STORAGE)
    record = identify_job.run(
        settings_of(one_part, other, str(tmp_path / "out"), previous=finished.output, chunk_rows=1000)
    )
    rows = {row["name"]: row for row in record["changes"]}
    assert {name: row["note"] for name, row in rows.items()} == {
        "diagonal": "new", "nearest": None, OTHER: "another registry", "checker": "vanished"
    }  # fmt: skip
    assert rows["nearest"]["change"] is not None and rows[OTHER]["change"] is None
    (warning,) = [text for text in record["warnings"] if "another registry" in text]
    assert "(new: diagonal; vanished: checker)" in warning


def test_too_many_broken_files_and_other_mistakes_are_refused(image_set, registry, tmp_path):
    with pytest.raises(FailedShareError, match=r"could not be read or decoded.*Raise max_failed_share to keep"):
        identify_job.run(settings_of(image_set, registry, str(tmp_path / "out"), max_failed_share=0.01))
    kept = tmp_path / "out" / "verdicts" / "part-00000.parquet"
    inode = os.stat(kept).st_ino
    identify_job.run(settings_of(image_set, registry, str(tmp_path / "out"), max_failed_share=0.5))
    assert os.stat(kept).st_ino == inode  # verdicts are reused, no image is read again
    with pytest.raises(AttribError, match=r"prevalence\.set_column: .* no metadata column 'acount'; it has account"):
        identify_job.run(settings_of(image_set, registry, str(tmp_path / "b"), prevalence={"set_column": "acount"}))
    with pytest.raises(AttribError, match=r"registry\.json is not there: run jobs\.registry"):
        identify_job.run(settings_of(image_set, str(tmp_path / "none"), str(tmp_path / "c")))


def test_too_few_negatives_for_the_rate_are_reported_before_the_work(one_part, registry, tmp_path, caplog):
    caplog.set_level("INFO")
    rate = {"false_attribution_rate": 0.001}
    record = identify_job.run(settings_of(one_part, registry, str(tmp_path / "out"), verdicts=rate, chunk_rows=1000))
    assert "nothing will be attributed: false_attribution_rate 0.001 is below" in caplog.text
    assert record["shares"] is None and record["verdicts"]["known"] == 0
    assert record["verdicts"]["unassessable"] == record["num_images"]


def test_verdicts_of_a_block_are_those_of_its_images(finished, image_set):
    identified, manifest = open_identified(finished.output, STORAGE), open_manifest(image_set["manifest"], STORAGE)
    check_same_images(identified, manifest)
    parts = [STORAGE.read_table(identified.part_uri(part)) for part in range(2)]
    found = block_verdicts(identified, [Slice(1, 0, 20), Slice(0, 50, 60)], STORAGE)
    expected = sorted([*parts[1]["id"].to_pylist()[:20], *parts[0]["id"].to_pylist()[50:60]])
    assert found["id"].to_pylist() == expected
    other = open_manifest(image_set["manifest"], STORAGE)
    object.__setattr__(other, "digest", "another")
    with pytest.raises(MismatchError, match="verdicts on other images"):
        check_same_images(identified, other)


def test_the_stored_registry_equals_the_registered_one(registry):
    opened = open_registry(registry, STORAGE)
    assert [entry.name for entry in opened.generators] == ["checker", "nearest"]
    assert [entry.name for entry in opened.negatives] == ["camera"]
