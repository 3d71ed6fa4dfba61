"""autofaiss, which needs faiss-cpu and NumPy 1 and therefore an environment of its own.

Only the standard library is imported at the top, because this module also runs in that environment.
"""

import os

PACKAGES = ("autofaiss==2.18.0", "faiss-cpu==1.15.1", "numpy==1.26.4", "pyarrow==17.0.0")


def environment_python(folder: str) -> str:
    """Path of the interpreter of the environment in `folder`."""
    return os.path.join(folder, "bin", "python")


def missing(folder: str) -> str:
    """Why autofaiss cannot run, with the command that creates its environment; "" if the environment exists."""
    if os.path.exists(environment_python(folder)):
        return ""
    install = f"{folder}/bin/pip install {' '.join(PACKAGES)}"
    return f"no environment in {folder}; create it: python -m venv {folder} && {install}"


def train_and_build(job: dict, clock) -> dict:
    """Lap "train and build". Keys of job: float32 (folder), output, num_lists, index_memory, memory, threads."""
    import autofaiss  # of its own environment

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
    if built is None:  # it prints the reason and returns None
        raise RuntimeError("autofaiss did not build an index; see its memory limits in attrib/benchmark/job.py")
    return {}
