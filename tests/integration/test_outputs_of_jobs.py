"""Every job refuses an output that holds files of the user or overlaps with an input, and changes nothing there."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from support.files import LOCAL
from support.generators import drawn_file
from support.identify import TRACES, drawn_registry
from support.images import pictures, write_folder
from support.pool import write_tiny_pool

from attrib.attribute import job as attribute_job
from attrib.attribute.report import write_report
from attrib.attribute.settings import AttributeSettings, ReportSettings
from attrib.benchmark import job as benchmark_job
from attrib.benchmark.settings import BenchmarkSettings
from attrib.capacity import job as scale_job
from attrib.capacity.settings import ScaleSettings
from attrib.common.config import load_settings
from attrib.common.errors import AttribError
from attrib.data import job as manifest_job
from attrib.data.settings import ManifestSettings
from attrib.demo import job as demo_job
from attrib.demo.settings import DemoSettings
from attrib.embed import job as embed_job
from attrib.embed.settings import EmbedSettings
from attrib.evaluate import job as evaluate_job
from attrib.evaluate.ablation import job as ablate_job
from attrib.evaluate.ablation.settings import AblateSettings
from attrib.evaluate.settings import EvaluateSettings
from attrib.generators.evaluation import job as evaluate_generators_job
from attrib.generators.evaluation.settings import EvaluateGeneratorsSettings
from attrib.generators.extractor import job as fingerprint_job
from attrib.generators.extractor.settings import FingerprintSettings
from attrib.generators.identify import job as identify_job
from attrib.generators.identify.settings import IdentifySettings
from attrib.generators.registry import registration
from attrib.generators.registry.settings import RegistrySettings
from attrib.generators.synthesis import job as synthesize_job
from attrib.generators.synthesis.settings import SynthesizeSettings
from attrib.index import job as index_job
from attrib.index.settings import IndexSettings
from attrib.pipeline import job as pipeline_job
from attrib.pipeline.settings import PipelineSettings
from attrib.train import job as train_job
from attrib.train.settings import TrainSettings

ROOT = Path(__file__).resolve().parents[2]
NETWORK = {"name": "test_resnet", "weights": "random"}
TRUTH = {"uri": "in/truth.csv", "key_column": "query"}


def collection(name: str) -> dict:
    return {"name": name, "uri": f"in/{name}"}


# Options of every job, with paths below the folder of the test, and an input that its output must not overlap with.
JOBS: dict[str, tuple[Callable, type, dict, str | None]] = {
    "manifest": (manifest_job.run, ManifestSettings, {"collection": collection("sources")}, "in/sources"),
    "embed": (
        embed_job.run,
        EmbedSettings,
        {"manifest": "in/run/sources/manifest", "backbone": NETWORK},
        "in/run/sources/manifest",
    ),
    "index": (index_job.run, IndexSettings, {"embeddings": "in/run/sources/embeddings"}, "in/run/sources/embeddings"),
    "attribute": (
        attribute_job.run,
        AttributeSettings,
        {"queries": "in/run/generated/embeddings", "index": "in/run/index"},
        "in/run/index",
    ),
    "pipeline": (
        pipeline_job.run,
        PipelineSettings,
        {"sources": collection("sources"), "generated": collection("generated"), "backbone": NETWORK},
        "in/generated",
    ),
    "train": (
        train_job.run,
        TrainSettings,
        {"manifest": "in/run/sources/manifest", "backbone": NETWORK},
        "in/run/sources/manifest",
    ),
    "ablate": (
        ablate_job.run,
        AblateSettings,
        {
            "sources": collection("sources"),
            "generated": collection("generated"),
            "truth": TRUTH,
            "backbone": NETWORK,
            "feature_sets": {"plain": {}},
            "variants": [{"name": "raw", "features": "plain", "head": {"projection": "identity", "net": "none"}}],
        },
        "in/sources",
    ),
    "evaluate": (
        evaluate_job.run,
        EvaluateSettings,
        {
            "methods": [
                {"name": "raw", "sources": "in/run/sources/embeddings", "queries": "in/run/generated/embeddings"}
            ],
            "truth": TRUTH,
        },
        "in/run/generated/embeddings",
    ),
    "synthesize": (
        synthesize_job.run,
        SynthesizeSettings,
        {"photographs": collection("sources"), "num_photographs": 4, "num_training_photographs": 4, "num_models": 2},
        "in/sources",
    ),
    "fingerprint": (fingerprint_job.run, FingerprintSettings, {"pool": "in/pool"}, "in/pool"),
    "identify": (
        identify_job.run,
        IdentifySettings,
        {"manifest": "in/run/generated/manifest", "registry": "in/registry"},
        "in/registry",
    ),
    "evaluate_generators": (
        evaluate_generators_job.run,
        EvaluateGeneratorsSettings,
        {"pool": "in/pool", "pools": {"other": {"uri": "in/pool"}}},
        "in/pool",
    ),
    "benchmark": (
        benchmark_job.run,
        BenchmarkSettings,
        {"collections": [collection("sources")], "backbone": NETWORK},
        "in/sources",
    ),
    "demo": (demo_job.run, DemoSettings, {}, None),
}
WITH_INPUT = [name for name, (*_, known) in JOBS.items() if known]


@pytest.fixture(scope="module")
def site(tmp_path_factory, local_ray) -> Path:
    """A folder with everything that a job reads."""
    folder = tmp_path_factory.mktemp("site")
    write_folder(pictures([f"s{i}.jpg" for i in range(12)]), str(folder / "in/sources"), LOCAL)
    generated = {f"{trace}-{i}.png": drawn_file(trace, 500 + i) for trace in TRACES for i in range(2)}
    write_folder(generated, str(folder / "in/generated"), LOCAL)
    (folder / "in/truth.csv").write_text("query,role,source_group\n")
    write_tiny_pool(str(folder / "in/pool"), LOCAL, num_models=8, num_images=24, px=24, num_bicubic=2)
    drawn_registry(str(folder / "in"), TRACES, 10, 10)
    values = JOBS["pipeline"][2] | {"output": "in/run"}
    pipeline_job.run(PipelineSettings(**placed(values, folder)))
    return folder


def placed(value, folder: Path):
    """The options with every path below `in/` or `out` placed in the folder."""
    if isinstance(value, dict):
        return {key: placed(part, folder) for key, part in value.items()}
    if isinstance(value, list):
        return [placed(part, folder) for part in value]
    return str(folder / value) if isinstance(value, str) and value.startswith(("in/", "out")) else value


def tree(folder: Path) -> dict[str, str]:
    """Digest of every file, and "" of every folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def refused(job: str, output: Path, site: Path, message: str) -> None:
    run, kind, values, _ = JOBS[job]
    before = tree(site)
    with pytest.raises(AttribError, match=message):
        run(kind(**placed(values, site) | {"output": str(output)}))
    assert tree(site) == before


@pytest.mark.parametrize("job", JOBS)
def test_files_of_the_user_are_refused_and_stay(job, site):
    mine = site / "mine"
    for name in ("part-00000.parquet", "block-00000.parquet", "failures.parquet", "sources/a.jpg", "work/b", "model/c"):
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text("mine")
    refused(job, mine, site, r"holds files that (this job|jobs\.\w+) did not make")


@pytest.mark.parametrize("job", WITH_INPUT)
@pytest.mark.parametrize("relation", ["equals", "contains", "lies inside"])
def test_an_output_that_overlaps_with_an_input_is_refused(relation, job, site):
    given = site / JOBS[job][3]
    output = {"equals": given, "contains": given.parent, "lies inside": given / "new" / "out"}[relation]
    refused(job, output, site, rf"output \S+ {relation} the input|holds files that jobs\.\w+ did not make")


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("other", ["sources/manifest", "sources/embeddings", "index", "attributions"])
def test_a_run_of_another_job_is_refused_and_stays(other, job, site):
    if other.endswith(job) or (job, other) in (("embed", "sources/embeddings"), ("attribute", "attributions")):
        return
    message = r"holds a run of another job|holds files that (this job|jobs\.\w+) did not make|equals the input"
    refused(job, site / "in/run" / other, site, message)


@pytest.mark.parametrize(("job", "folder"), [("synthesize", "_manifests"), ("evaluate_generators", "photographs")])
def test_a_folder_of_the_user_with_a_name_of_the_job_is_refused(folder, job, site):
    (site / job / folder).mkdir(parents=True, exist_ok=True)
    (site / job / folder / "a.jpg").write_text("mine")
    refused(job, site / job, site, rf"did not make \({folder}\)")


def test_a_page_of_the_user_is_refused_and_stays(site):
    page, attributions = site / "mine.html", str(site / "in/run/attributions")
    page.write_text("<!doctype html><p>mine")
    before = tree(site)
    with pytest.raises(AttribError, match="is a file that this job did not make"):
        write_report(ReportSettings(attributions=attributions, output=str(page)))
    with pytest.raises(AttribError, match="is a file that this job did not make"):
        write_report(ReportSettings(attributions=attributions, output=f"{attributions}/attributions.json"))
    assert tree(site) == before


def test_a_registry_is_not_made_among_files_of_the_user(site):
    before = tree(site)
    values = {"action": "register", "name": "a", "images": placed(collection("generated"), site)}
    values |= {"method": {"name": "log-spectrum", "uri": str(site / "in/method")}}
    for folder, message in (("in/sources", "holds files"), ("in/generated", "equals"), ("in/generated/new", "inside")):
        with pytest.raises(AttribError, match=message):
            registration.run(RegistrySettings(**values, registry=str(site / folder)))
    assert tree(site) == before


def test_a_plan_is_not_written_among_files_of_the_user(site):
    settings = load_settings(ScaleSettings, str(ROOT / "configs" / "scale.yaml"))
    before = tree(site)
    with pytest.raises(AttribError, match="holds files that this job did not make"):
        scale_job.run(settings.model_copy(update={"output": str(site / "in/sources")}))
    assert tree(site) == before


def test_photographs_that_do_not_suffice_leave_the_folder_free(site):
    for photographs in (collection("sources"), collection("generated")):
        values = JOBS["synthesize"][2] | {"photographs": photographs, "num_photographs": 400}
        with pytest.raises(AttribError, match="photographs of 64 px or more are needed"):
            synthesize_job.run(SynthesizeSettings(**placed(values, site), output=str(site / "few")))
        assert [path for path in (site / "few").rglob("*") if path.is_file()] == []
