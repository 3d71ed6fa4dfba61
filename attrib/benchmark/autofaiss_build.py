"""autofaiss, which needs faiss-cpu and NumPy 1 and therefore an environment of its own.

Only the standard library is imported at the top, because this module also runs in that environment.
"""

import os


def environment_python(folder: str) -> str:
    """Path of the interpreter of the environment in `folder`."""
    return os.path.join(folder, "bin", "python")


def missing(folder: str) -> str:
    """Why autofaiss cannot run, and the remedy; "" if its environment exists."""
    if os.path.exists(environment_python(folder)):
        return ""
    return f"no environment in {folder}; create it as attrib/benchmark/RESULTS.md says"


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
