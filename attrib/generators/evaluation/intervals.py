"""What is measured of each generator, to means with 95 % intervals over families of generators."""

import numpy as np

from attrib.generators.evaluation import measures
from attrib.generators.evaluation.settings import LOSS_DEGRADATION

VALUES = {
    "identification": "identified",
    "f1": "macro-F1",
    "family_identification": "family identified",
    "verification_auc": "verification AUC",
    "true_positive_rate": "TPR",
    "false_positive_rate": "FPR",
    "rejection_auroc": "rejection AUROC",
    "oscr": "OSCR",
    "family_rejection_auroc": "family rejection",
    "real_auroc": "real AUROC",
    "adjusted_rand": "ARI",
    "purity": "purity",
}


def family_numbers(tier: dict) -> np.ndarray:
    """int64 [G] of a tier as the job describes it."""
    return np.unique(tier["families"], return_inverse=True)[1]


def as_array(values: list | None) -> np.ndarray:
    """float64 [G], nan where there is none."""
    return np.array([np.nan] if values is None else values, np.float64)


def share_interval(values: list | None, families: np.ndarray) -> dict | None:
    """{mean, low, high} of values in 0..1; None where nothing was measured."""
    array = as_array(values)
    return None if np.isnan(array).all() else measures.mean_interval(array, families, (0.0, 1.0))._asdict()


def difference_interval(values: np.ndarray, others: np.ndarray, families: np.ndarray) -> dict | None:
    """The same of values minus others, paired over generators."""
    if np.isnan(values - others).all():
        return None
    return measures.mean_interval(values - others, families, (-1.0, 1.0))._asdict()


def loss(measured: dict, families: np.ndarray, value: str = "identification") -> dict | None:
    """How much identification, or family_identification, falls from untouched images to compressed ones, whose references are compressed alike.

    None where images are too small, or there are no families.
    """
    degraded = measured["degradations"][LOSS_DEGRADATION]
    if degraded is None or value not in measured["values"]:
        return None
    return difference_interval(as_array(measured["values"][value]), as_array(degraded["matched"][value]), families)
