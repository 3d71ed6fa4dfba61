"""autofaiss, which needs faiss-cpu and NumPy 1 and therefore an environment of its own.

This module also runs there, so it imports only the standard library at its top; no other contender can share it.
"""

import os

MEMORY, INDEX_MEMORY = "8G", "6G"


def train_and_build(job: dict, clock) -> dict:
    """Lap "train and build". Keys of job: float32 and folder (folders), num_lists, threads."""
    import autofaiss  # of its own environment

    with clock.lap("train and build"):
        built = autofaiss.build_index(
            embeddings=job["float32"],
            index_path=os.path.join(job["folder"], "knn.index"),
            index_infos_path=os.path.join(job["folder"], "infos.json"),
            index_key=f"IVF{job['num_lists']},Flat",
            metric_type="l2",
            max_index_memory_usage=INDEX_MEMORY,
            current_memory_available=MEMORY,
            nb_cores=job["threads"],
            verbose=30,
        )
    if built is None:  # it prints the reason and returns None
        raise RuntimeError(
            "autofaiss did not build an index; see its memory limits in attrib/benchmark/autofaiss_build.py"
        )
    return {}
