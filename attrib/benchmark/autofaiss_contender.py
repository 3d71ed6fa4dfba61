"""autofaiss as a contender, in an environment of its own that is made here: it wants faiss-cpu and an older NumPy.

The contender itself imports nothing of this project but the standard-library clock.
"""

import logging
import os
import subprocess
import venv
from pathlib import Path

from attrib.benchmark.contender import Clock

logger = logging.getLogger(__name__)

# Exact versions, as for the project's own dependencies.
PACKAGES = ("autofaiss==2.18.0", "faiss-cpu==1.15.1", "numpy==1.26.4", "pyarrow==17.0.0")
INSTALL_SECONDS = 600


def environment_python(folder: str) -> str:
    """The interpreter of the environment below `folder`, made with pip if it is not there. Raises OSError with pip's last word if that fails."""
    python = os.path.join(folder, "bin", "python")
    ready = Path(folder, ".ready")
    if ready.exists() and ready.read_text(encoding="utf-8").split() == list(PACKAGES):
        return python
    logger.info("benchmark: installing autofaiss into an environment of its own")
    try:
        venv.create(folder, with_pip=True, clear=True)
        command = [python, "-m", "pip", "install", "-q", *PACKAGES]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except (subprocess.SubprocessError, OSError) as error:
        raise OSError(f"the environment could not be made: {type(error).__name__}") from error
    if ended.returncode:
        lines = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")] or ["no word"]
        raise OSError(f"pip could not install autofaiss: {lines[0][:120]}")
    ready.write_text(" ".join(PACKAGES), encoding="utf-8")
    return python


def train_and_build(job: dict, clock: Clock) -> dict:
    import autofaiss

    with clock.lap("train and build"):
        built = autofaiss.build_index(
            embeddings=job["float32"],
            index_path=os.path.join(job["output"], "knn.index"),
            index_infos_path=os.path.join(job["output"], "infos.json"),
            index_key=f"IVF{job['num_lists']},Flat",
            metric_type="l2",
            max_index_memory_usage=job["index_memory"],
            current_memory_available=job["memory"],
            nb_cores=job["threads"],
            verbose=30,
        )
    if built is None:  # it prints why and returns
        raise RuntimeError("autofaiss refused to build; its memory limits are in the job")
    return {}
