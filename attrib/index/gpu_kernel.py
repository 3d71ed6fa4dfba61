"""The arithmetic of a scan in torch, for GPUs: the same as `attrib/index/cpu_kernel.py` with float16 products, and k-means.

FAISS's own GPU indexes are not used: they limit k and nprobe to 2,048, ignore the selectors that opt-outs need, and bring a CUDA runtime of
another version than torch's into the process. A matrix product needs none of that: a GPU holds a hundred million vectors of 256 float16
numbers and multiplies them with thousands of queries at once. Everything here also runs on a CPU, where the tests compare it.
"""

import numpy as np
import torch

from attrib.common.errors import AttribError
from attrib.index.cpu_kernel import CpuKernel
from attrib.index.shard import Shard

# Unit queries rounded to float16, products with float16 vectors, and the result rounded to float16: each at most 2^-11 of a score up to one.
HALF_TOLERANCE = 2.0**-9
FREE_SHARE = 0.8  # of the free memory of a GPU that resident vectors may take; the rest is for products
UPLOAD_ROWS = 1 << 18  # vectors in pageable memory at a time on their way to the GPU


class TorchKernel:
    """CpuKernel's interface (attrib/index/cpu_kernel.py) on a torch device."""

    tolerance = HALF_TOLERANCE
    device = "cuda"

    def __init__(self, queries: np.ndarray, width: int, margin: float):
        if self.device == "cuda" and not torch.cuda.is_available():
            raise AttribError(
                "torch sees no GPU in a worker that was given one; is its CUDA driver installed? Or set device: cpu"
            )
        # Sums of float16 products stay float32, whichever way a product is cut.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        self.queries = torch.from_numpy(queries).to(self.device, torch.float16)
        self.exact_queries = torch.from_numpy(queries).to(self.device)
        self.width, self.margin = width, margin
        self.floors = torch.full((len(queries),), -torch.inf, device=self.device)

    def vectors(self, shard: Shard, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) as unit float16: made so in float32, since float16 has no room for other lengths."""
        stored = resident_vectors(shard, self.device)
        if stored is None:
            stored = torch.from_numpy(np.array(shard.vectors[start:stop])).to(self.device)
        else:
            stored = stored[start:stop]
        norms = torch.from_numpy(np.array(shard.inverse_norms[start:stop])).to(self.device)
        return (stored.float() * norms[:, None]).half()

    def decoded(self, shard: Shard, list_number: int, start: int, stop: int) -> torch.Tensor:
        """As CpuKernel's, float32: what is decoded is multiplied exactly, since candidates of all shards are cut by these scores."""
        return torch.from_numpy(CpuKernel.decoded(self, shard, list_number, start, stop)).to(self.device)

    def reaching(self, rows: np.ndarray, block: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As CpuKernel's, with the block on the device."""
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
        return self.floors.cpu().numpy()[queries]

    def raise_floors(self, floors: np.ndarray) -> None:
        self.floors = torch.maximum(self.floors, torch.from_numpy(floors).to(self.device))


_resident: list[tuple[np.ndarray, torch.Tensor]] = []  # the vectors of the shard that this process searched last


def resident_vectors(shard: Shard, device: str) -> torch.Tensor | None:
    """The shard's vectors float16 [n, d] on the GPU, where they stay as long as the shard is searched; None where they do not fit."""
    if _resident and _resident[0][0] is shard.vectors:
        return _resident[0][1]
    _resident.clear()
    if device != "cuda" or shard.vectors.nbytes > FREE_SHARE * torch.cuda.mem_get_info()[0]:
        return None
    stored = torch.empty(shard.vectors.shape, dtype=torch.float16, device=device)
    for start in range(0, len(stored), UPLOAD_ROWS):
        part = np.array(shard.vectors[start : start + UPLOAD_ROWS])
        stored[start : start + len(part)] = torch.from_numpy(part)
    _resident.append((shard.vectors, stored))
    return stored
