"""Calibrator of shares without pairs: fitted on views of held-out source images, whose sources are known."""

import numpy as np

from attrib.shares.calibration import fit_shares, pairs_from_corpus, reliability
from attrib.shares.shares import soft_shares
from attrib.train.augment.views import view_seed
from attrib.train.batches import InputBatches
from attrib.train.student import Student

TOP_K = 10


def shares_of_views(student: Student, batches: InputBatches, top_k: int = TOP_K) -> dict:
    """{"inverse_temperature", "offset", "held_out": Reliability as a dict, "construction"}.

    Fitted on all views of held-out images against all source images; its reliability is that of a calibrator fitted on
    the views of one half of these images and measured on those of the other, each way.
    """
    inputs, rows = batches.inputs, batches.validation_rows
    views, anchors = (vectors.cpu().numpy() for vectors in batches.validation_embeddings(student))
    sources = inputs.view_sources[rows].numpy()
    similarity, is_true = pairs_from_corpus(views, anchors, sources, inputs.anchor_ids.numpy(), top_k)
    half = np.array([view_seed(0, int(image_id), 0) % 2 == 0 for image_id in sources[:, 0]])
    shares = np.zeros(similarity.shape)
    for mine in (half, ~half):
        if mine.any() and is_true[~mine].any():
            shares[mine] = soft_shares(similarity[mine], fit_shares(similarity[~mine], is_true[~mine]))
    fitted = fit_shares(similarity, is_true)
    return fitted.model_dump() | {
        "construction": f"{len(rows)} views of {len(np.unique(sources[:, 0]))} held-out images, top "
        f"{similarity.shape[1]}",
        "held_out": reliability(shares, is_true).to_dict(),
    }
