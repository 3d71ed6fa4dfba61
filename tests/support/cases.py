"""Runs the commands of a case of shared/cases in this process, on a copy of its folder."""

import importlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import boto3
import timm
import torch
from safetensors.torch import save_file

from attrib.attribute.settings import ReportSettings
from attrib.common.config import load_settings
from attrib.common.errors import AttribError
from attrib.common.storage import join
from attrib.data.manifest import open_manifest
from attrib.data.settings import ManifestSettings
from attrib.embed.embeddings import open_embeddings
from attrib.embed.settings import EmbedSettings
from attrib.pipeline.settings import PipelineSettings
from support.files import LOCAL
from support.hostile import encode
from support.images import picture

ROOT = Path(__file__).resolve().parents[2]
CASES = Path(os.environ.get("ATTRIB_CASES") or ROOT.parent / "shared" / "cases")
JOBS = {"manifest": ManifestSettings, "embed": EmbedSettings, "pipeline": PipelineSettings, "report": ReportSettings}
BACKBONE, BUCKET = "test_resnet", "cases"
# What is added up to the output of the network.
LAST_LAYERS = [f"layer4.0.{layer}.{name}" for layer in ("bn2", "downsample.2") for name in ("weight", "bias")]
OBJECTS = {"dots": ("./a.png", "b/../c.png", "d.png"), "objpre": ("a.png", "a.png/b.png")}


@dataclass
class Case:
    """What the commands of one case left. errors: messages of the jobs that refused; log: of all of them."""

    out: Path
    errors: list[str] = field(default_factory=list)
    log: str = ""

    @property
    def error(self) -> str:
        (message,) = self.errors
        return message

    def images(self, manifest: str = "manifest") -> list[dict]:
        """Rows of a manifest."""
        assert not self.errors, self.errors
        listed = open_manifest(str(self.out / manifest), LOCAL)
        uris = [listed.partition_uri(part) for part in range(len(listed.num_rows))]
        return [row for uri in uris for row in LOCAL.read_table(uri).to_pylist()]

    def keys(self, manifest: str = "manifest") -> list[str]:
        return sorted(row["key"] for row in self.images(manifest))

    def vectors(self, embeddings: str = "embeddings", manifest: str = "manifest") -> dict[str, dict]:
        """Rows of embeddings by the keys of their images."""
        keys = {row["id"]: row["key"] for row in self.images(manifest)}
        made = open_embeddings(str(self.out / embeddings), LOCAL)
        uris = [made.part_uri(part) for part in range(len(made.num_rows))]
        return {keys[row["id"]]: row for uri in uris for row in LOCAL.read_table(uri).to_pylist()}

    def sources(self, query: str) -> list[dict]:
        """Attribution rows of a generated image, by rank."""
        assert not self.errors, self.errors
        folder = str(self.out / "run" / "attributions" / "attributions")
        rows = [row for name in LOCAL.names(folder, suffix=".parquet") for row in read(folder, name)]
        return sorted((row for row in rows if row["query_key"] == query), key=lambda row: row["rank"])

    def page(self) -> str:
        assert not self.errors, self.errors
        return (self.out / "run" / "report.html").read_text(encoding="utf-8")


def read(folder: str, name: str) -> list[dict]:
    return LOCAL.read_table(join(folder, name)).to_pylist()


def map_in_this_process(worker: type, arguments: tuple, chunks, pool, **_):
    """map_chunks of attrib.runtime without its actors, of which each run would start new ones for a few images."""
    return map(worker(*arguments), map(asdict, chunks))


def write_weights(path: Path, scale: float = 1.0) -> None:
    """Random weights of BACKBONE whose embeddings are `scale` times as long."""
    torch.manual_seed(0)
    state = timm.create_model(BACKBONE, pretrained=False).state_dict()
    for name in LAST_LAYERS:
        state[name] *= scale
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)


def fill_bucket(case: str, endpoint: str) -> None:
    """The objects of the S3 cases, whose keys no file system can hold."""
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    client.create_bucket(Bucket=BUCKET)
    for seed, key in enumerate(OBJECTS[case]):
        client.put_object(Bucket=BUCKET, Key=f"{case}/{key}", Body=encode(picture(seed), "PNG"))


class Runner:
    """run(name): does what CMD of the case says, except that $CASES is a copy of the case in `folder`."""

    def __init__(self, folder: Path, demo: Path, endpoint: Callable[[], str], log):
        self.folder, self.endpoint, self.log = folder, endpoint, log
        self.variables = {
            "CASES": str(folder / "cases"),
            "OUT": str(folder / "out"),
            "DEMO": str(demo),
            "WORK": "work",
            "VENV": ".venv",
        }

    def run(self, name: str, *overrides: str) -> Case:
        """overrides: KEY=VALUE, further ones of every job of the case."""
        shutil.copytree(CASES / name, self.folder / "cases" / name, symlinks=True)
        subprocess.run(["chmod", "-R", "u+w", str(self.folder / "cases")], check=True)
        case = Case(self.folder / "out" / name)
        case.out.mkdir(parents=True)
        for line in (CASES / name / "CMD").read_text(encoding="utf-8").splitlines():
            if line and not line.startswith(("cd ", "rm -rf ")):
                self._run(shlex.split(line), case, overrides)
        case.log = self.log.text
        return case

    def _expand(self, text: str) -> str:
        for name, value in self.variables.items():
            text = text.replace(f"${name}", value)
        return text

    def _run(self, words: list[str], case: Case, overrides: tuple[str, ...]) -> None:
        command, *arguments = map(self._expand, words)
        if "127.0.0.1:5797" in " ".join(arguments):
            arguments = [a.replace("http://127.0.0.1:5797", self.endpoint()) for a in arguments]
        if not command.endswith("bin/python"):
            subprocess.run([command, *arguments], check=True)
        elif arguments[0] == "-m":
            self._job(arguments[1].removeprefix("jobs."), arguments[2:], case, overrides)
        elif arguments[0] == "work/scale_weights.py":
            write_weights(Path(arguments[2]), float(arguments[1]))
        elif arguments[0] == "work/s3case.py":
            fill_bucket(arguments[1], self.endpoint())
        else:
            subprocess.run([sys.executable, *arguments], check=True)

    def _job(self, job: str, arguments: list[str], case: Case, overrides: tuple[str, ...]) -> None:
        assert arguments[0] == "--config" and set(arguments[2::2]) == {"--set"}
        package = {"manifest": "data"}.get(job, job)
        try:
            settings = load_settings(JOBS[job], str(ROOT / arguments[1]), [*arguments[3::2], *overrides])
            importlib.import_module(f"attrib.{package}.job").run(settings)
        except (AttribError, OSError) as error:
            case.errors.append(str(error))
