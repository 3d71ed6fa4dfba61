"""--set: a value means what its key asks for, and an error blames the override that caused it."""

import pytest
import yaml

from attrib.attribute.settings import ReportSettings
from attrib.common.config import load_settings
from attrib.common.errors import AttribError
from attrib.data.settings import ManifestSettings
from attrib.embed.settings import EmbedSettings
from attrib.pipeline.settings import PipelineSettings

MANIFEST = {"collection": {"name": "c", "uri": "images"}, "output": "out"}
REPORT = {"attributions": "a", "output": "o"}
EMBED = {"manifest": "m", "output": "out", "backbone": {"name": "test_resnet"}}
PIPELINE = {
    "sources": {"name": "s", "uri": "s"},
    "generated": {"name": "g", "uri": "g"},
    "output": "o",
    "backbone": {"name": "test_resnet", "weights": "random"},
}


def load(kind, values, tmp_path, *overrides):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return load_settings(kind, str(path), list(overrides))


TEXTS = (
    "/a/my #1 set", "a # b", "#1", "Audit: night 2", "a: b: c", "2026-11-30", "2026-11-30 10:00:00", "12:30:45", "1e5",
    "007", "0x1f", "1_000", "3.0", "yes", "on", "null", "~", "- a", "[x]", "{x: y}", "{x", "[1", "&a b", "*a",
    "!x y", "@a", "%a", "`a`",
    "12:30", "2026-02-30", "0x_", ".", "[" * 5000, "&a [*a]",
    "a | b", "|", ">", "? a", "a,b", " a ", "a  b", "it's", 'say "x"', "\ta", "...", "---", "=", "<<",
)  # fmt: skip


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:20])
def test_a_string_is_taken_as_it_is(text, tmp_path):
    assert load(ReportSettings, REPORT, tmp_path, f"title={text}").title == text
    loaded = load(PipelineSettings, PIPELINE, tmp_path, f"report.title={text}")
    assert loaded.stages()["report"].title == text


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:20])
def test_one_item_is_taken_for_a_list(text, tmp_path):
    if text in ("[x]", "- a"):  # lists already
        return
    assert load(ReportSettings, REPORT, tmp_path, f"roll_up={text}").roll_up == (text,)
    loaded = load(PipelineSettings, PIPELINE, tmp_path, f"report.roll_up={text}")
    assert loaded.stages()["report"].roll_up == (text,)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"a: b"', "a: b"),
        ("'2026'", "2026"),
        ("'a # b'", "a # b"),
        ('"a" # b', '"a" # b'),
        ("'it''s'", "it's"),
    ],
)
def test_quotes_of_yaml_are_still_taken_off(text, expected, tmp_path):
    assert load(ReportSettings, REPORT, tmp_path, f"title={text}").title == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a, b]", ("a", "b")),
        ("[2026-11-30, 7, on]", ("2026-11-30", "7", "on")),
        ("['a #1', b #2]", ("a #1", "b #2")),
        ("[]", ()),
    ],
)
def test_items_of_a_list_are_taken_as_they_are(text, expected, tmp_path):
    assert load(ReportSettings, REPORT, tmp_path, f"roll_up={text}").roll_up == expected


def test_names_paths_and_sections(tmp_path):
    loaded = load(PipelineSettings, PIPELINE, tmp_path, "generated.name=2026-11-30", "report.roll_up=owner",
                  "sources.metadata={uri: /my #1.csv, key_column: 7}", "report.title=Audit: night 2")  # fmt: skip
    assert loaded.generated.name == "2026-11-30"
    assert (loaded.sources.metadata.uri, loaded.sources.metadata.key_column) == ("/my #1.csv", "7")
    report = loaded.stages()["report"]
    assert (report.roll_up, report.title) == (("owner",), "Audit: night 2")
    loaded = load(ManifestSettings, MANIFEST, tmp_path, "collection.extensions=.png", "collection.exclude=#thumbs")
    assert loaded.collection.extensions == (".png",) and loaded.collection.exclude == ("#thumbs",)


def test_other_types_keep_the_rules_of_yaml(tmp_path):
    loaded = load(EmbedSettings, EMBED, tmp_path, "chunk_rows=1_0", "retry_failed=yes", "num_workers=null",
                  "max_failed_share=5e-1", "ray={num_cpus: 2}", "storage.endpoint=null")  # fmt: skip
    assert (loaded.chunk_rows, loaded.retry_failed, loaded.num_workers) == (10, True, None)
    assert (loaded.max_failed_share, loaded.ray.num_cpus, loaded.storage.endpoint) == (0.5, 2, None)


@pytest.mark.parametrize(
    ("overrides", "blamed", "not_blamed"),
    [
        (["chunk_rows=many"], ["--set chunk_rows=many: these settings", "(got 'many')"], ["config.yaml"]),
        (["chunk_rows=7 # per commit"], ["--set chunk_rows=7 # per commit", "(got '7 # per commit')"], ["config.yaml"]),
        (["chunk_rows=1", "chunk_rows=0"], ["--set chunk_rows=0: these"], ["--set chunk_rows=1", "config.yaml"]),
        (["chunk_rows="], ["--set chunk_rows=: these", "(got None)"], ["config.yaml"]),
        (["backbone.name="], ["--set backbone.name=: these", "(got '')"], ["config.yaml"]),
        (["backbone.weights=\udcff"], ["--set backbone.weights=\\udcff", "is not UTF-8 text"], ["config.yaml"]),
        (["output=a\0b"], ["--set 'output=a", "not valid YAML"], ["config.yaml"]),
        (["chunk_rows=[1"], ["--set 'chunk_rows=[1'", "not valid YAML"], ["config.yaml"]),
        (["backbone={nmae: x}"], ["--set backbone={nmae: x}: these", "did you mean name?"], ["config.yaml"]),
        (["storage.endpoint=h:1"], ["config.yaml with --set storage.endpoint=h:1"], []),
        (["output=${UNSET_X}"], ["--set output=${UNSET_X} uses ${UNSET_X}"], ["config.yaml"]),
        (["=3"], ["--set '=3' is not of the form"], ["config.yaml"]),
        (["xyz.a=3"], ["--set xyz.a=3", "xyz: unknown key"], []),
    ],
)
def test_an_error_blames_what_set_the_value(overrides, blamed, not_blamed, tmp_path):
    with pytest.raises(AttribError) as error:
        load(EmbedSettings, EMBED, tmp_path, *overrides)
    for part in blamed:
        assert part in str(error.value), str(error.value)
    for part in not_blamed:
        assert part not in str(error.value), str(error.value)


def test_numbers_are_decimal(tmp_path):
    loaded = load(EmbedSettings, EMBED, tmp_path, "chunk_rows=017", "io_threads=1_0", "max_megapixels=1e2")
    assert (loaded.chunk_rows, loaded.io_threads, loaded.max_megapixels) == (17, 10, 100.0)
    with pytest.raises(AttribError, match="--set chunk_rows=1:30: these"):
        load(EmbedSettings, EMBED, tmp_path, "chunk_rows=1:30")


CANARY = "pass/word"


@pytest.mark.parametrize(
    "override",
    [
        f"storage.endpoint=http://me:{CANARY}@store", f"storage.endpoint=me:{CANARY}@store",
        f"storage=http://me:{CANARY}@store", f"storage.end_point=http://me:{CANARY}@store",
        f"storage={{endpoint: 'http://me:{CANARY}@store'}}", f"storage.secret_key={CANARY}",
        f"storage={{aws_secret_access_key: {CANARY}}}", f"ray.address=http://me:{CANARY}@head:8265",
        f"output=s3://KEY:{CANARY}@bucket/x", f"output=S3://KEY:{CANARY}@bucket/x", f"output=http://me:{CANARY}@h/x",
        f"sources.uri=s3://KEY:{CANARY}@bucket", f"sources={{name: s, uri: 's3://KEY:{CANARY}@bucket'}}",
        f"sources.metadata=s3://KEY:{CANARY}@bucket", f"identify.registry=s3://KEY:{CANARY}@bucket/registry",
        f"embed.max_megapixels=s3://KEY:{CANARY}@bucket", f"backbone.weights=s3://KEY:{CANARY}@b/x.safetensors",
    ],
)  # fmt: skip
def test_credentials_are_refused_and_not_printed(override, tmp_path):
    with pytest.raises(AttribError) as error:
        load(PipelineSettings, PIPELINE, tmp_path, override)
    assert CANARY not in str(error.value) and "word" not in str(error.value), str(error.value)
    assert f"--set {override.partition('=')[0]}" in str(error.value)


def test_errors_of_the_file_blame_the_file(tmp_path):
    with pytest.raises(AttribError) as error:
        load(EmbedSettings, EMBED | {"io_threads": 0}, tmp_path, "chunk_rows=many", "device=cpu")
    text = str(error.value)
    assert f"{tmp_path}/config.yaml: these settings are not valid:\n  io_threads" in text
    assert "--set chunk_rows=many: these settings are not valid:\n  chunk_rows" in text and "device" not in text
