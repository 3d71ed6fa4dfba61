"""Build the wheel, install it into a new environment outside the checkout, and run jobs there."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml
from support.hostile import encode
from support.images import picture, write_folder
from support.pool import write_tiny_pool

from attrib.common.storage import join

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(600)


def run(command: list, folder: Path) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)], folder)
    (found,) = folder.glob("attrib-*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> str:
    """Interpreter of an environment with the wheel and the dependencies of this one, without the checkout."""
    folder = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", str(folder / "venv")], folder)
    interpreter = str(folder / "venv" / "bin" / "python")
    run([interpreter, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)], folder)
    own = run([interpreter, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], folder).stdout.strip()
    # As a plain path, so that .pth files in it, e.g. of an editable install, are ignored.
    Path(own, "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    where = run([interpreter, "-c", "import attrib; print(attrib.__file__)"], folder).stdout
    assert where.startswith(own)
    return interpreter


def test_the_wheel_holds_every_template(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".jinja")}
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "attrib").rglob("*.jinja")}
    assert held == there and len(there) >= 4


def test_the_demo_runs_from_the_wheel_and_reports_its_recall(python, tmp_path):
    options = {
        "output": "demo",
        "num_sources": 100,
        "num_exemplars": 3,
        "samples_per_exemplar": 2,
        "num_epochs": 1,
        "ray.num_cpus": 1,
    }
    given = [part for key, value in options.items() for part in ("--set", f"{key}={value}")]
    report = run([python, "-m", "jobs.demo", *given], tmp_path).stdout
    assert "6 (0 failed)" in report and (tmp_path / "demo" / "run" / "report.html").exists()
    trained = json.loads((tmp_path / "demo" / "model" / "train.json").read_text())
    assert trained["num_images"] == 100 and [row["epoch"] for row in trained["history"]] == [-1, 0]
    rates = {line[:34].strip(): line[34:].split() for line in report.splitlines() if line[34:].split()}
    assert rates["chance"] == ["0.010", "0.100"]
    untrained = ("the same network, untrained", "the same, whitened, no training")
    for name in ("this run (Parquet)", "colour histogram", *untrained):
        at_1, _, _, at_10, _, _ = rates[name]
        assert 0 <= float(at_1) <= float(at_10) <= 1


def test_generators_are_evaluated_from_the_wheel(python, tmp_path, local):
    write_tiny_pool(str(tmp_path / "pool"), local, num_models=4, num_images=12, px=32)
    for number, name in enumerate(("a", "b", "c")):
        images = {f"{i:02d}.png": encode(picture(100 * number + i), "PNG") for i in range(12)}
        write_folder(images, join(str(tmp_path / "images"), name), local)
    settings = {
        "pool": "pool",
        "output": "evaluated",
        "methods": {"spectrum": {"patch_px": 16, "max_patches": 4}},
        "folders": {"drawn": {"uri": "images", "generators": ["a", "b", "c"], "judged": True, "num_splits": 2}},
        "num_references": 4,
        "reference_counts": [1, 4],
        "set_sizes": [1, 2],
        "degradations": ["none", "jpeg-85"],
    }
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    run([python, "-m", "jobs.evaluate_generators", "--config", "evaluate.yaml"], tmp_path)
    assert "<html" in (tmp_path / "evaluated" / "evaluation.html").read_text(encoding="utf-8")
