"""The library where Ray cannot be imported: which modules need it, and a search without it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# The modules that cannot be imported without Ray, beside every job.py: Ray's own package, and what runs its tasks.
NEEDS_RAY = [
    "attrib.attribute.merge",
    "attrib.index.sampling",
    "attrib.runtime.admission",
    "attrib.runtime.chunk_stream",
    "attrib.runtime.session",
    "attrib.runtime.tasks",
    "attrib.runtime.trainer",
    "attrib.train.feature_tasks",
]


WITHOUT_RAY = """
import importlib, pkgutil, sys
sys.modules["ray"] = None  # from here on every import of ray fails
import numpy as np
import attrib
needs_ray = []
for module in pkgutil.walk_packages(attrib.__path__, "attrib."):
    if module.name.endswith(".job"):
        continue
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        if (error.name or "").split(".")[0] != "ray":
            raise
        needs_ray.append(module.name)
print(*sorted(needs_ray))
from attrib.index.shard import Shard
from attrib.index.normalize import inverse_norms, unit_rows
from attrib.index.search import search_shard
vectors = np.random.default_rng(0).standard_normal((100, 8)).astype(np.float16)
shard = Shard(np.arange(100), vectors, inverse_norms(vectors.astype(np.float32)))
found = search_shard(shard, unit_rows(vectors[7:9]), 1, 5, 1, False)
print(found.id.tolist())
"""


def test_the_library_works_where_ray_cannot_be_imported():
    ended = subprocess.run([sys.executable, "-c", WITHOUT_RAY], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout.splitlines() == [" ".join(NEEDS_RAY), "[7, 8]"], ended.stderr
