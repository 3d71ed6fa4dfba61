"""Configs: what is wrong is named before any work, and every example config is valid."""

import importlib
import json
import logging
import os
import pkgutil
from datetime import datetime
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

import attrib
from attrib.attribute.settings import AttributeSettings
from attrib.common.config import digest, load_settings, parse_arguments, validate, versions
from attrib.common.errors import AttribError
from attrib.common.logs import FORMAT_VARIABLE
from attrib.common.settings import Settings, StorageSettings, result_settings
from attrib.data.settings import CollectionSettings, ManifestSettings
from attrib.demo.settings import DemoSettings
from attrib.embed.settings import EmbedSettings
from attrib.evaluate.settings import EvaluateSettings
from attrib.generators.identify.settings import IdentifySettings
from attrib.index.settings import IndexSettings
from attrib.pipeline.settings import PipelineSettings
from attrib.train.settings import TrainSettings

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
COLLECTION = {"name": "c", "uri": "images"}
MANIFEST = {"collection": COLLECTION, "output": "out"}
EMBED = {"manifest": "m", "output": "out", "backbone": {"name": "test_resnet"}}
METHOD = {"name": "raw", "sources": "s", "queries": "q"}
EVALUATE = {"methods": [METHOD], "truth": {"uri": "t"}, "output": "out"}
TRAIN = {"manifest": "m", "output": "out", "backbone": {"name": "test_resnet"}}
PIPELINE = {
    "sources": COLLECTION,
    "generated": COLLECTION | {"name": "g"},
    "output": "out",
    "backbone": {"name": "test_resnet", "weights": "random"},
}


def load(kind, values, tmp_path, *overrides):
    path = tmp_path / "config.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return load_settings(kind, str(path), list(overrides))


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        (EmbedSettings, EMBED | {"xyz": 3}, ["xyz: unknown key; known are", "chunk_rows, device,", "(got 3)"]),
        (EmbedSettings, EMBED | {"chunk_row": 3}, ["chunk_row: unknown key; did you mean chunk_rows?"]),
        (EmbedSettings, EMBED | {"backbone": {"name": "x", "wieghts": "hub"}},
         ["backbone.wieghts", "did you mean weights?"]),
        (ManifestSettings, MANIFEST | {"collection": COLLECTION | {"metadata": {"url": "x"}}},
         ["collection.metadata.url", "did you mean uri?", "collection.metadata.uri: Field required"]),
        (EmbedSettings, EMBED | {"chunk_rows": 0}, ["chunk_rows", "greater than 0", "(got 0)"]),
        (EmbedSettings, EMBED | {"chunk_rows": "many"}, ["chunk_rows", "integer", "'many'"]),
        (EmbedSettings, EMBED | {"device": "tpu"}, ["device", "'auto', 'cpu' or 'cuda'", "'tpu'"]),
        (EmbedSettings, EMBED | {"max_failed_share": 5}, ["max_failed_share", "less than or equal to 1", "(got 5)"]),
        (EmbedSettings, {"output": "out"}, ["manifest: Field required", "backbone: Field required"]),
        (EmbedSettings, EMBED | {"output": "gs://bucket/x"}, ["output", "unsupported scheme", "s3://"]),
        (EmbedSettings, EMBED | {"output": ""}, ["output", "an empty path"]),
        (EmbedSettings, EMBED | {"backbone": {"name": "x", "weights": "w.pt"}},
         ["backbone", "w.pt", "convert the weights to .safetensors"]),
        (EmbedSettings, EMBED | {"storage": {"endpoint": "http://"}}, ["storage", "'http://' needs", "a host"]),
        (EmbedSettings, EMBED | {"storage": {"endpoint": "minio:9000"}}, ["storage", "minio:9000", "http://"]),
        (EmbedSettings, EMBED | {"ray": {"object_store_gib": 0}}, ["ray.object_store_gib", "greater than 0"]),
        (ManifestSettings, MANIFEST | {"collection": COLLECTION | {"name": "a b"}}, ["collection.name", "'a b'"]),
        (ManifestSettings, MANIFEST | {"collection": COLLECTION | {"format": "parquet"}},
         ["collection", "exactly one of bytes_column and uri_column"]),
        (ManifestSettings, MANIFEST | {"collection": COLLECTION | {"format": "parquet", "bytes_column": "b"}},
         ["needs key_column"]),
        (ManifestSettings, MANIFEST | {"collection": COLLECTION | {"key_column": "k"}}, ["belong to format 'parquet'"]),
        (IndexSettings, {"embeddings": "e", "output": "o", "recall_target": 1.5},
         ["recall_target", "less than or equal to 1"]),
        (AttributeSettings, {"queries": "q", "index": "i", "output": "o", "shares": {"offset": 1}},
         ["shares.offset", "(got 1)"]),
        (EvaluateSettings, EVALUATE | {"methods": [METHOD, METHOD | {"name": "b", "source": "x"}]},
         ["methods.1.source: unknown key; did you mean sources?", "(got 'x')"]),
        (EvaluateSettings, EVALUATE | {"methods": [METHOD | {"xyz": 1}]},
         ["methods.0.xyz: unknown key; known are distractors, mapper, name, queries, shares, sources"]),
        (EvaluateSettings, EVALUATE | {"truth": {"uri": "t", "rolecolumn": "r"}},
         ["truth.rolecolumn: unknown key; did you mean role_column?"]),
        (TrainSettings, TRAIN | {"head": {"parts": {"style": {"blocks": ["pooled"], "dimensions": 3}}}},
         ["head.parts.style.dimensions: unknown key; did you mean dimension?"]),
        (TrainSettings, TRAIN | {"head": {"parts": {"style": {"xyz": 3}}}},
         ["head.parts.style.xyz: unknown key; known are blocks, dimension, role",
          "head.parts.style.blocks: Field required"]),
        (TrainSettings, TRAIN | {"head": {"parts": {"role": {"blocks": ["pooled"], "rolle": "style"}}}},
         ["head.parts.role.rolle: unknown key; did you mean role?"]),
        (TrainSettings, TRAIN | {"head": {"shrinkag": 0.1}}, ["head.shrinkag: unknown key; did you mean shrinkage?"]),
        (TrainSettings, TRAIN | {"views": {"mix": {"textures": 1}}},
         ["views.mix.textures: unknown key; did you mean texture?"]),
        (TrainSettings, TRAIN | {"fine_tune": {"num_block": 1}},
         ["fine_tune.num_block: unknown key; did you mean num_blocks?"]),
        (TrainSettings, TRAIN | {"head": {"parts": {"all": {"blocks": ["layout_2"]}}}},
         ["head.parts.all uses block 'layout_2'", "use one of pooled"]),
    ],
)  # fmt: skip
def test_an_invalid_value_is_named_with_its_rule(kind, values, expected, tmp_path):
    with pytest.raises(AttribError) as error:
        load(kind, values, tmp_path)
    for part in ("config.yaml: these settings are not valid:\n", *expected):
        assert part in str(error.value), str(error.value)
    assert "Value error" not in str(error.value) and "(got {" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "values", "expected"),
    [
        ("manifest", {"partition_rows": -1}, ["manifest.partition_rows", "greater than 0", "(got -1)"]),
        ("embed", {"chunk_row": 9}, ["embed.chunk_row", "did you mean chunk_rows?"]),
        ("index", {"kind": "hnsw"}, ["index.kind", "'ivf_flat'", "'hnsw'"]),
        ("attribute", {"shares": {"offset": 5}}, ["attribute.shares.offset", "(got 5)"]),
        ("report", {"title": ["x"]}, ["report.title", "string"]),
        ("embed", {"output": "x"}, ["embed.output is filled in by the pipeline; leave it out"]),
        ("embed", "fast", ["embed", "dictionary", "'fast'"]),
    ],
)
def test_a_pipeline_names_the_invalid_section(section, values, expected, tmp_path):
    with pytest.raises(AttribError) as error:
        load(PipelineSettings, PIPELINE | {section: values}, tmp_path)
    for part in expected:
        assert part in str(error.value), str(error.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "config.yaml"]


def test_a_pipeline_hands_its_common_settings_to_every_stage(tmp_path):
    values = PIPELINE | {"max_failed_share": 0.5, "storage": {"client": "s3fs"}, "embed": {"max_failed_share": 0.25}}
    stages = load(PipelineSettings, values, tmp_path).stages()
    assert {stage.storage.client for stage in stages.values()} == {"s3fs"}
    assert stages["attributions"].max_failed_share == 0.5 and stages["generated/embeddings"].max_failed_share == 0.25
    assert stages["index"].embeddings == stages["sources/embeddings"].output
    assert stages["attributions"].queries == stages["generated/embeddings"].output
    with pytest.raises(AttribError, match="share the name 'c'"):
        load(PipelineSettings, PIPELINE | {"generated": COLLECTION}, tmp_path)


def test_overrides_reach_nested_keys_and_are_typed(tmp_path):
    overrides = (
        "backbone.name=resnet50",
        "chunk_rows=7",
        "storage.endpoint=http://h:1",
        "retry_failed=true",
        "num_workers=null",
    )
    loaded = load(EmbedSettings, EMBED | {"num_workers": 3}, tmp_path, *overrides)
    assert (loaded.backbone.name, loaded.chunk_rows, loaded.storage.endpoint) == ("resnet50", 7, "http://h:1")
    assert loaded.retry_failed is True and loaded.num_workers is None
    assert load(ManifestSettings, MANIFEST, tmp_path, "collection.extensions=[.png]").collection.extensions == (".png",)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("chunk_rows", "not of the form key=value"),
        ("=3", "not of the form key=value"),
        ("output.x=3", "'output' holds a value, not a section"),
        ("backbone.nmae=3", "did you mean name?"),
        ("chunk_rows=[1", "not valid YAML"),
    ],
)
def test_an_invalid_override_is_named(override, expected, tmp_path):
    with pytest.raises(AttribError) as error:
        load(EmbedSettings, EMBED, tmp_path, override)
    assert expected in str(error.value)


def test_environment_variables_fill_values(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", "/a: b #c")  # would be YAML of another meaning
    monkeypatch.setenv("ROWS", "12")
    text = "# ${UNSET} in a comment\nmanifest: m\noutput: ${PLACE}/x\nchunk_rows: ${ROWS}\nbackbone: {name: $ROWS}\n"
    loaded = load(EmbedSettings, text, tmp_path)
    assert (loaded.output, loaded.chunk_rows, loaded.backbone.name) == ("/a: b #c/x", 12, "$ROWS")
    assert load(EmbedSettings, text, tmp_path, "output=${PLACE}").output == "/a: b #c"
    monkeypatch.delenv("ROWS")
    with pytest.raises(AttribError, match=r"uses \$\{ROWS\}, but no environment variable ROWS is set; set it"):
        load(EmbedSettings, text, tmp_path)


def test_paths_become_absolute_where_they_were_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = load(EmbedSettings, EMBED | {"output": "s3://b/x/", "manifest": "file:///m/../n"}, tmp_path)
    assert (loaded.output, loaded.manifest) == ("s3://b/x", "/n")
    weights = EMBED | {"backbone": {"name": "x", "weights": "w.safetensors"}, "output": "~/o"}
    loaded = load(EmbedSettings, weights, tmp_path)
    assert loaded.manifest == os.path.join(os.getcwd(), "m") and loaded.output == os.path.expanduser("~/o")
    assert loaded.backbone.weights == os.path.join(os.getcwd(), "w.safetensors")
    assert EmbedSettings.model_validate(loaded.model_dump(mode="json")) == loaded  # as records keep them


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("output: a\noutput: b", "the key 'output' occurs twice"),
        ("storage: {region: a, region: b}", "the key 'region' occurs twice"),
        ("a: &a [*a]", "not valid YAML"),
        pytest.param("a: " + "[" * 5000, "not valid YAML", id="deep"),
        ("a: 2026-02-30", "not valid YAML"),
        ("[1, 2]: 3", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("a: [1", "not valid YAML"),
        ("- a\n- b", "key: value pairs, not a list"),
        ("", "manifest: Field required"),
    ],
)
def test_a_file_that_is_no_config_is_named(text, expected, tmp_path):
    with pytest.raises(AttribError, match=expected):
        load(EmbedSettings, text, tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(AttribError, match=r"cannot read the config .*absent\.yaml: No such file"):
        load_settings(EmbedSettings, str(tmp_path / "absent.yaml"))
    with pytest.raises(AttribError, match="cannot read the config"):
        load_settings(EmbedSettings, str(tmp_path))
    (tmp_path / "latin.yaml").write_bytes(b"output: caf\xe9")
    with pytest.raises(AttribError, match="not UTF-8"):
        load_settings(EmbedSettings, str(tmp_path / "latin.yaml"))


def test_a_config_error_ends_with_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_arguments(EmbedSettings, "text", ["--config", str(tmp_path / "absent.yaml")])
    assert exit.value.code == 2 and "error: cannot read the config" in capsys.readouterr().err


IDENTIFY = {"manifest": "m", "registry": "r", "output": "o"}
BOTH_NAMES = [
    (IdentifySettings, IDENTIFY, lambda section: section),
    (PipelineSettings, PIPELINE, lambda section: {"identify": {"registry": "r"} | section}),
]


@pytest.mark.parametrize(("kind", "values", "nested"), BOTH_NAMES)
def test_an_old_key_is_accepted_with_one_warning_and_means_the_new_one(kind, values, nested, tmp_path, caplog):
    new = load(kind, values | nested({"prevalence": {"num_draws": 200}}), tmp_path)
    assert not caplog.records
    old = load(kind, values | nested({"dump": {"num_draws": 200}}), tmp_path)
    assert old == new and [record.levelname for record in caplog.records] == ["WARNING"]
    assert "'dump' is now called 'prevalence'" in caplog.text
    # As when a config has the new key and --set the old one.
    both = load(kind, values | nested({"dump": {"num_draws": 200}, "prevalence": {"num_draws": 100}}), tmp_path)
    assert both == new
    with pytest.raises(AttribError, match="both 'prevalence' and its old name 'dump'"):
        load(kind, values | nested({"dump": 1, "prevalence": {}}), tmp_path)
    with pytest.raises(AttribError, match=r"prevalence\.num_draw: unknown key; did you mean num_draws\?"):
        load(kind, values | nested({"dump": {"num_draw": 200}}), tmp_path)


def test_retired_keys_are_ignored_with_a_warning_in_sections_too(caplog):
    class Section(Settings):
        retired_keys: ClassVar = {"old": "its comparison was removed"}
        value: int = 1

    class Job(Settings):
        section: Section = Section()

    assert validate(Job, {"section": {"old": 3, "value": 2}}, "x.yaml").section.value == 2
    assert "old is no longer used: its comparison was removed; delete it from the config" in caplog.text
    with pytest.raises(AttribError, match="unknown key"):
        validate(Job, {"old": 3}, "x.yaml")


def test_records_keep_the_old_key(tmp_path, caplog):
    """The identity of a run is a digest of its recorded settings, so a finished run must be found again."""
    loaded = load(IdentifySettings, IDENTIFY | {"prevalence": {"num_draws": 200}}, tmp_path)
    recorded = loaded.model_dump(mode="json")
    assert recorded["dump"]["num_draws"] == 200 and "prevalence" not in recorded
    assert result_settings(loaded)["dump"] == recorded["dump"]
    assert IdentifySettings.model_validate(recorded) == loaded
    assert IdentifySettings.model_validate_json(loaded.model_dump_json()) == loaded and not caplog.records


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_log_format_is_an_option_of_the_command_line(log_format, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(FORMAT_VARIABLE, "text")
    monkeypatch.setattr(logging.getLogger(), "handlers", [*logging.getLogger().handlers])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(MANIFEST))
    arguments = ["--config", "config.yaml", "--log-format", log_format]
    assert parse_arguments(ManifestSettings, "text", arguments) == load(ManifestSettings, MANIFEST, tmp_path)
    log = logging.getLogger("attrib.test")
    log.info("listed", extra={"numbers": {"done": 3}})
    log.warning("slow")
    lines = capsys.readouterr().err.splitlines()
    if log_format == "text":
        assert lines == ["listed", "WARNING: slow"]
        return
    first, second = map(json.loads, lines)
    assert datetime.fromisoformat(first.pop("time")).tzinfo
    assert first == {"level": "info", "logger": "attrib.test", "message": "listed", "done": 3}
    assert (second["level"], second["message"]) == ("warning", "slow")


def test_a_job_without_a_config_starts_from_the_defaults(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert parse_arguments(DemoSettings, "text", [], needs_config=False) == DemoSettings()
    assert parse_arguments(DemoSettings, "text", ["--set", "seed=3"], needs_config=False) == DemoSettings(seed=3)
    assert load_settings(DemoSettings, str(CONFIGS / "demo.yaml")) == DemoSettings()
    with pytest.raises(SystemExit):
        parse_arguments(DemoSettings, "text", ["--set", "sed=3"], needs_config=False)
    assert "--set sed=3: these settings are not valid:" in capsys.readouterr().err


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        StorageSettings().region = "x"


def test_the_digest_depends_on_values_alone():
    assert digest({"a": 1, "b": [1.5, None]}) == digest({"b": [1.5, None], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_versions_name_what_took_part():
    assert {"python", "ray", "torch", "timm", "pyarrow"} <= set(versions())


def settings_of(path: Path):
    """The settings class of an example config: a first line names its job."""
    job = path.read_text(encoding="utf-8").split("jobs.", 1)[1].split()[0].strip(".:,;()")
    name = "".join(word.capitalize() for word in job.split("_")) + "Settings"
    found = [m.name for m in pkgutil.walk_packages(attrib.__path__, "attrib.") if m.name.endswith(".settings")]
    modules = map(importlib.import_module, found)
    return next(getattr(module, name) for module in modules if hasattr(module, name))


def test_every_example_config_is_valid(monkeypatch):
    for name in ("ATTRIB_DATA", "ATTRIB_BUCKET", "AWS_REGION"):
        monkeypatch.setenv(name, "example")
    configs = sorted(CONFIGS.glob("*.yaml"))
    assert configs, "the examples are missing"
    for path in configs:
        load_settings(settings_of(path), str(path))


def test_collections_may_be_given_as_values():
    assert validate(CollectionSettings, COLLECTION, "here").format == "folder"


@pytest.mark.parametrize(
    "values",
    [
        {"manifest": "/m", "output": "s3://me:pass-word@bucket/run"},
        {"manifest": "/m", "output": "/o", "storage": {"endpoint": "https://me:pass-word@store:9000"}},
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_printed(values):
    with pytest.raises(AttribError, match="must not hold credentials; set AWS_ACCESS_KEY_ID") as caught:
        validate(EmbedSettings, values, "here")
    assert "pass-word" not in str(caught.value)
