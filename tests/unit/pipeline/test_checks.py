"""What a pipeline finds wrong before the first image is read, with nothing in its output; rescan of its stages."""

import os

import pytest
from support.images import pictures, write_folder

from attrib.common.errors import AttribError
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage
from attrib.pipeline.checks import check_pipeline, metadata_columns
from attrib.pipeline.settings import PipelineSettings

LOCAL = Storage(StorageSettings())


@pytest.fixture
def values(tmp_path) -> dict:
    """Settings of a pipeline in which nothing is wrong."""
    for role in ("sources", "generated"):
        write_folder(pictures(["0.jpg"]), str(tmp_path / role), LOCAL)
    (tmp_path / "owners.csv").write_text("key,owner,licence\n0.jpg,x,CC0\n")
    return {
        "sources": {"name": "s", "uri": str(tmp_path / "sources"), "metadata": {"uri": str(tmp_path / "owners.csv")}},
        "generated": {"name": "g", "uri": str(tmp_path / "generated")},
        "output": str(tmp_path / "out"),
        "backbone": {"name": "test_resnet", "weights": "random"},
        "report": {"roll_up": ["licence", "owner"]},
    }


def test_a_pipeline_without_fault_passes_and_nothing_is_left(values, tmp_path):
    check_pipeline(PipelineSettings(**values), LOCAL)
    assert not os.path.exists(values["output"]) or os.listdir(values["output"]) == []
    assert metadata_columns(PipelineSettings(**values).sources, LOCAL) == ["owner", "licence"]


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("sources", {"uri": "/absent"}, "collection 's': /absent does not exist; correct uri"),
        ("generated", {"uri": "/absent"}, "collection 'g': /absent does not exist; correct uri"),
        ("generated", {"format": "webdataset"}, r"no \.tar file below"),
        ("sources", {"metadata": {"uri": "/absent.csv"}}, "the metadata table /absent.csv does not exist"),
        ("generated", {"metadata": {"uri": "/absent.csv"}}, "the metadata table /absent.csv does not exist"),
        ("backbone", {"name": "test_resne"}, "timm has no network 'test_resne'"),
        ("backbone", {"weights": "/absent.safetensors"}, "/absent.safetensors does not exist; correct backbone"),
        ("report", {"roll_up": ["owner", "studio"]},
         r"report.roll_up: .* no metadata column 'studio'; choose from owner, licence"),
        ("identify", {"registry": "/absent"}, "/absent/registry.json is not there: run jobs.registry"),
    ],
)  # fmt: skip
def test_a_fault_is_named_and_nothing_is_written(section, changes, message, values):
    values[section] = values.get(section, {}) | changes
    with pytest.raises(AttribError, match=message):
        check_pipeline(PipelineSettings(**values), LOCAL)
    assert not os.path.exists(values["output"])


def test_a_registry_whose_method_is_gone_is_named(values, tmp_path):
    method = {"name": "log-spectrum", "uri": str(tmp_path / "absent")}
    record = {"method": method, "method_digest": "d", "degradations": ["none"], "entries": []}
    LOCAL.write_json(str(tmp_path / "registry/registry.json"), record)
    values["identify"] = {"registry": str(tmp_path / "registry")}
    with pytest.raises(AttribError, match=r"absent/lda\.safetensors does not exist"):
        check_pipeline(PipelineSettings(**values), LOCAL)
    assert not os.path.exists(values["output"])


def test_columns_of_a_collection_without_metadata(values):
    del values["sources"]["metadata"]
    with pytest.raises(AttribError, match=r"no metadata column 'licence'; choose from none \(sources.metadata is not"):
        check_pipeline(PipelineSettings(**values), LOCAL)


def test_an_output_that_cannot_be_written_is_named(values, tmp_path):
    (tmp_path / "file").write_text("x")
    values["output"] = str(tmp_path / "file" / "out")
    with pytest.raises(AttribError, match=r"file/out cannot be written \(Not a directory\); correct its rights"):
        check_pipeline(PipelineSettings(**values), LOCAL)


def test_rescan_is_handed_to_every_stage_that_has_it(values):
    values |= {"identify": {"registry": "r"}}
    stages = PipelineSettings(**values, rescan=True).stages()
    assert [name for name, stage in stages.items() if not getattr(stage, "rescan", False)] == ["report"]
    assert not any(getattr(stage, "rescan", False) for stage in PipelineSettings(**values).stages().values())
    with pytest.raises(ValueError, match=r"embed\.rescan is filled in by the pipeline; leave it out"):
        PipelineSettings(**values, embed={"rescan": False}, rescan=True)
