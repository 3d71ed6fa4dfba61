"""Where things live: Ray behind one door, and jobs that answer before anything heavy is loaded."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py") if path.stem not in ("__init__", "exit"))
MAX_JOB_STATEMENTS = 40


def python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


# One process for all jobs: starting Python and pydantic takes longer than the jobs do. Each runs as with `python -m`.
START_JOBS = """
import contextlib, io, runpy, sys
config = sys.argv[1]
for job in sys.argv[2:]:
    # Without arguments the demo runs; the others ask for a config.
    for arguments in (["--help"], ["--config", config], [])[: 2 if job == "demo" else 3]:
        sys.argv[:] = [job, *arguments]
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                runpy.run_module(f"jobs.{job}", run_name="__main__")
            code = None
        except SystemExit as exit:
            code = exit.code
        heavy = [name for name in ("ray", "torch", "timm", "faiss", "pyarrow", "numpy") if name in sys.modules]
        said = (out if arguments == ["--help"] else err).getvalue()
        print(job, code, ",".join(heavy) or "-", "usage: " in said, "error: " in said)
"""


def test_help_and_config_errors_answer_before_anything_heavy_is_loaded(tmp_path):
    config = tmp_path / "wrong.yaml"
    config.write_text("no_such_key: 1\n")
    ended = python(START_JOBS, str(config), *JOBS)
    expected = []
    for job in JOBS:
        expected += [f"{job} 0 - True False", f"{job} 2 - False True"]
        expected += [f"{job} 2 - True True"] if job != "demo" else []
    assert ended.stdout.splitlines() == expected, ended.stderr


@pytest.mark.parametrize("arguments", [("--help", 0), ("--config=absent.yaml", 2)])
def test_a_job_in_a_process_of_its_own_ends_with_its_code(arguments):
    argument, code = arguments
    ended = subprocess.run([sys.executable, "-m", "jobs.embed", argument], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("job", JOBS)
def test_jobs_are_thin(job):
    tree = ast.parse((ROOT / "jobs" / f"{job}.py").read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert [function.name for function in functions] == ["main"] and not [
        n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)
    ]
    assert sum(isinstance(node, ast.stmt) for node in ast.walk(tree)) <= MAX_JOB_STATEMENTS
    at_the_top = {name for node in tree.body if isinstance(node, ast.ImportFrom) for name in [node.module]}
    assert all(name in ("attrib.common.config", "jobs.exit") or name.endswith("settings") for name in at_the_top)
