"""The arithmetic of a scan on a GPU with torch: the same as `attrib/index/cpu_kernel.py`, with float16 products.

The GPU indexes of FAISS are not used. They limit k and nprobe to 2,048, ignore the selectors that opt-outs need, and
load a CUDA runtime of another version than torch's. The code also runs on a CPU, where tests compare it.
"""

import numpy as np
import torch

from attrib.common.errors import AttribError
from attrib.index.cpu_kernel import CpuKernel
from attrib.index.shard import Shard

# Queries, vectors and products are each rounded to float16: an error of at most 2^-11 each for scores up to one.
HALF_TOLERANCE = 2.0**-9
FREE_SHARE = 0.8  # share of the free GPU memory for resident vectors; the rest is for products
UPLOAD_ROWS = 1 << 18  # vectors per copy to the GPU, to bound host memory

_resident: list[tuple[np.ndarray, torch.Tensor]] = []  # the vectors of the shard that this process searched last


class TorchKernel(CpuKernel):
    """CpuKernel (attrib/index/cpu_kernel.py) on a torch device. Raises AttribError if torch sees no GPU."""

    tolerance = HALF_TOLERANCE
    device = "cuda"

    def __init__(self, queries: np.ndarray, width: int, margin: float):
        if self.device == "cuda" and not torch.cuda.is_available():
            raise AttribError(
                "torch sees no GPU in a worker that was given one; check its CUDA driver, or set device: cpu"
            )
        # Keep the sums of float16 products in float32 for every split of the matrix product.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        self.queries = torch.from_numpy(queries).to(self.device, torch.float16)
        self.exact_queries = torch.from_numpy(queries).to(self.device)
        self.width, self.margin = width, margin
        self.floors = torch.full((len(queries),), -torch.inf, device=self.device)

    def vectors(self, shard: Shard, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) as unit vectors float16 [b, d]; float32 until normalised, to avoid overflow."""
        resident, rows = resident_vectors(shard, self.device), slice(start, stop)
        stored = self._copy(shard.vectors[rows]) if resident is None else resident[rows]
        return (stored.float() * self._copy(shard.inverse_norms[rows])[:, None]).half()

    def _copy(self, rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(rows)).to(self.device)

    def decoded(self, shard: Shard, list_number: int, start: int, stop: int) -> torch.Tensor:
        """Like CpuKernel.decoded. The vectors stay float32: candidates of all shards are selected by scan scores."""
        return torch.from_numpy(super().decoded(shard, list_number, start, stop)).to(self.device)

    def reaching(self, rows: np.ndarray, block: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Like CpuKernel.reaching, with the block on the device."""
        at = torch.from_numpy(rows).to(self.device)
        queries = self.queries if block.dtype == torch.float16 else self.exact_queries
        scores = (queries[at] @ block.T).float()
        floors = self.floors[at]
        if scores.shape[1] > self.width:
            best = scores.topk(self.width, dim=1).values[:, -1] - self.margin
            floors = torch.maximum(floors, best)
            self.floors[at] = floors
        query, position = torch.nonzero(scores >= floors[:, None], as_tuple=True)
        found = scores[query, position]
        return query.cpu().numpy(), position.cpu().numpy(), found.cpu().numpy()

    def floors_of(self, queries: np.ndarray) -> np.ndarray:
        return np.asarray(self.floors.cpu().numpy()[queries])

    def raise_floors(self, floors: np.ndarray) -> None:
        self.floors = torch.maximum(self.floors, torch.from_numpy(floors).to(self.device))


def resident_vectors(shard: Shard, device: str) -> torch.Tensor | None:
    """Return the vectors of the shard, float16 [n, d], kept on the GPU until the next shard; None if too large."""
    if _resident and _resident[0][0] is shard.vectors:
        return _resident[0][1]
    _resident.clear()
    if device != "cuda" or shard.vectors.nbytes > FREE_SHARE * torch.cuda.mem_get_info()[0]:
        return None
    stored = torch.empty(shard.vectors.shape, dtype=torch.float16, device=device)
    for start in range(0, len(stored), UPLOAD_ROWS):
        rows = np.array(shard.vectors[start : start + UPLOAD_ROWS])
        stored[start : start + len(rows)] = torch.from_numpy(rows)
    _resident.append((shard.vectors, stored))
    return stored
