"""The identify job on drawn generators: verdicts of every kind of input, restarts, the dump's figures, and the columns that attribution takes over."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from generator_samples import drawn_file, drawn_samples, spectrum_method, write_spectrum_method
from hostile import hostile_images
from samples import pictures, write_folder

from attrib.distributed import manifest as manifest_job
from attrib.distributed import pipeline
from attrib.distributed.generators import identify
from attrib.errors import AttribError, FailedShareError, MismatchError
from attrib.generators.registration import as_sources
from attrib.generators.registry import create_registry, open_registry, register
from attrib.generators.registry_settings import IdentifySettings, RegistryMethodSettings
from attrib.generators.summary import SET_SCHEMA
from attrib.generators.verdict_files import (
    block_verdicts,
    check_same_images,
    open_identified,
    read_fingerprints,
    schema,
)
from attrib.manifest import Slice, open_manifest
from attrib.pipeline_settings import PipelineSettings
from attrib.settings import ManifestSettings, StorageSettings
from attrib.storage import Storage, join

STORAGE = Storage(StorageSettings())
TRACES = ("nearest", "checker")
COUNTS = {"nearest": 30, "checker": 12, "diagonal": 25, None: 9}  # diagonal is not registered


@pytest.fixture(scope="module")
def registry(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("registry")
    write_spectrum_method(str(root / "method"), STORAGE)
    method = spectrum_method()
    made_by = RegistryMethodSettings(name="log-spectrum", uri=str(root / "method"))
    held = create_registry(str(root / "registry"), made_by, method, ("none", "jpeg-85"), STORAGE)
    for trace in TRACES:
        held, _ = register(held, trace, "generator", [drawn_samples(trace, range(15))], method, STORAGE)
    photographs = as_sources(drawn_samples(None, range(30)), "photographs")
    register(held, "camera", "photographs", photographs, method, STORAGE)
    return held.uri


@pytest.fixture(scope="module")
def dump(tmp_path_factory, local_ray) -> dict:
    """A manifest of drawn images, with an account of each, and of files that are wrong in every way."""
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
    settings = ManifestSettings(
        collection={"name": "dump", "uri": join(root, "images"), "metadata": {"uri": join(root, "accounts.csv")}},
        output=join(root, "manifest"),
        partition_rows=60,
    )
    manifest_job.run(settings)
    return {"root": root, "manifest": settings.output, "num_images": len(files) + len(bad)}


def settings_of(made: dict, registry: str, output: str, **options) -> IdentifySettings:
    given = {
        "manifest": made["manifest"],
        "registry": registry,
        "output": output,
        "max_failed_share": 0.5,
        "chunk_rows": 25,
        "max_megapixels": 10,
        "dump": {"num_draws": 100, "set_column": "account", "num_permutations": 99, "min_candidate_images": 10},
    }
    return IdentifySettings(**given | options)


@pytest.fixture(scope="module")
def finished(dump, registry, tmp_path_factory) -> IdentifySettings:
    settings = settings_of(dump, registry, str(tmp_path_factory.mktemp("finished") / "out"))
    identify.run(settings)
    return settings


def verdicts_of(settings: IdentifySettings) -> pa.Table:
    folder = join(settings.output, "verdicts")
    return pa.concat_tables([STORAGE.read_table(join(folder, name)) for name in STORAGE.names(folder)])


def test_every_image_has_one_verdict_and_bad_input_a_reason(finished, dump):
    table = verdicts_of(finished)
    assert len(table) == dump["num_images"] == len(pc.unique(table["id"]))
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


def test_the_record_tells_shares_candidates_and_sets(finished):
    record = open_identified(finished.output, STORAGE).record
    assert sum(record["verdicts"].values()) == record["num_images"] and record["abstains"] is None
    shares = {share["name"]: share for share in record["shares"]}
    assessed = record["num_images"] - record["verdicts"]["unassessable"]
    for trace in TRACES:
        assert shares[trace]["low"] <= COUNTS[trace] / assessed <= shares[trace]["high"]
    assert record["changes"] is None and record["negatives"] == {"photographs": 30, "generators": 30}
    # The odd files are variants of one picture, and so a candidate of their own.
    shown = [[exemplar["key"] for exemplar in candidate["exemplars"]] for candidate in record["candidates"]]
    assert any(len(keys) == 12 and all(key.startswith("diagonal") for key in keys) for keys in shown)
    sizes = [candidate["num_images"] for candidate in record["candidates"]]
    assert sizes == sorted(sizes, reverse=True) and min(sizes) >= 10
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
    assert any("JPEG" in warning or "BMP" in warning for warning in record["warnings"])


def test_a_restart_does_what_is_missing_and_gives_the_same(finished, dump, registry, tmp_path, capfd):
    settings = settings_of(dump, registry, str(tmp_path / "out"), chunk_rows=10)
    identify.run(settings)
    first = verdicts_of(settings)
    assert first.equals(verdicts_of(finished))  # however the work is cut
    kept = join(settings.output, "verdicts", "part-00000.parquet")
    inode = os.stat(kept).st_ino
    STORAGE.delete_file(join(settings.output, "generators.json"))
    STORAGE.delete_file(join(settings.output, "verdicts", "part-00001.parquet"))
    record = identify.run(settings)
    assert os.stat(kept).st_ino == inode and verdicts_of(settings).equals(first)
    assert "resuming, 70 of 130 images" in capfd.readouterr().err
    assert identify.run(settings) == record
    assert not STORAGE.exists(join(settings.output, "_chunks"))
    with pytest.raises(AttribError, match="holds results of other settings"):
        identify.run(settings_of(dump, registry, settings.output, verdicts={"false_attribution_rate": 0.1}))


def test_an_earlier_run_gives_the_change(finished, dump, registry, tmp_path):
    settings = settings_of(dump, registry, str(tmp_path / "out"), previous=finished.output)
    record = identify.run(settings)
    assert [row["name"] for row in record["changes"]] == [share["name"] for share in record["shares"]]
    assert not any(row["changed"] for row in record["changes"])


def test_too_many_broken_files_and_other_mistakes_are_refused(dump, registry, tmp_path):
    with pytest.raises(FailedShareError, match="could not be read or decoded"):
        identify.run(settings_of(dump, registry, str(tmp_path / "out"), max_failed_share=0.01))
    with pytest.raises(AttribError, match="has no metadata column 'acount'; it has account"):
        identify.run(settings_of(dump, registry, str(tmp_path / "b"), dump={"set_column": "acount"}))
    with pytest.raises(AttribError, match=r"registry\.json is not there: run jobs\.registry"):
        identify.run(settings_of(dump, str(tmp_path / "none"), str(tmp_path / "c")))


def test_a_rate_that_the_negatives_cannot_show_is_said_before_the_work(dump, registry, tmp_path, capfd):
    rate = {"false_attribution_rate": 0.001}
    record = identify.run(settings_of(dump, registry, str(tmp_path / "out"), verdicts=rate))
    assert "WARNING: nothing will be attributed: false_attribution_rate 0.001 is below" in capfd.readouterr().err
    assert record["shares"] is None and record["verdicts"]["known"] == 0
    assert record["verdicts"]["unassessable"] == record["num_images"]


def test_verdicts_of_a_block_are_those_of_its_images(finished, dump):
    identified, manifest = open_identified(finished.output, STORAGE), open_manifest(dump["manifest"], STORAGE)
    check_same_images(identified, manifest)
    parts = [STORAGE.read_table(identified.part_uri(part)) for part in range(2)]
    found = block_verdicts(identified, [Slice(1, 0, 20), Slice(0, 50, 60)], STORAGE)
    expected = sorted([*parts[1]["id"].to_pylist()[:20], *parts[0]["id"].to_pylist()[50:60]])
    assert found["id"].to_pylist() == expected
    other = open_manifest(dump["manifest"], STORAGE)
    object.__setattr__(other, "digest", "another")
    with pytest.raises(MismatchError, match="verdicts on other images"):
        check_same_images(identified, other)


def test_a_pipeline_carries_the_generators_into_rows_and_page(registry, tmp_path, local_ray):
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
    pipeline.run(settings)
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


def test_the_registry_is_read_as_it_was_registered(registry):
    opened = open_registry(registry, STORAGE)
    assert [entry.name for entry in opened.generators] == ["checker", "nearest"]
    assert [entry.name for entry in opened.negatives] == ["camera"]
