"""Multinomial logistic regression on a few references: the classifier that papers put on frozen features, with an L2 penalty."""

import numpy as np
import torch

from attrib.generators.fingerprints.scoring import References, Scorer, Scoring, check_references

GRADIENT_TOLERANCE = 1e-7  # of the mean loss; its values then agree to about ten digits
MAX_ITERATIONS = 1000
# torch's LBFGS learns nothing from a step whose product with the gradient's change is below 1e-10, which at this tolerance are most.
LOSS_UNITS = 1e6


def logistic_scores(strength: float) -> Scoring:
    """The log probability of each generator, after a regression fitted on all references."""

    def fit(references: References) -> Scorer:
        check_references(references)
        rows = np.concatenate(references).astype(np.float64)
        labels = np.repeat(np.arange(len(references)), [len(group) for group in references])
        mean = rows.mean(axis=0)
        # One scale for all dimensions keeps the geometry, and with it the meaning of the penalty whatever made the rows.
        scale = np.sqrt(np.square(rows - mean).mean()) or 1.0
        weights, bias = fit_logistic((rows - mean) / scale, labels, len(references), strength)

        def scores(queries: np.ndarray) -> np.ndarray:
            logits = torch.from_numpy((queries - mean) / scale @ weights + bias)
            return torch.log_softmax(logits, dim=1).numpy().astype(np.float32)

        return scores

    return fit


def fit_logistic(
    rows: np.ndarray, labels: np.ndarray, num_classes: int, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """The only minimum of sum_i w_i * -log p(label_i | row_i) + strength / 2 * |weights|^2, with sum(bias) = 0.

    rows: float64 [n, d]; labels: int [n], every class there; w_i: n / (G * rows of its class), so that a class with more references is not
    preferred. Returns weights float64 [d, G] and bias float64 [G].
    """
    # The minimum lies in the span of the rows: many dimensions cost no more than there are references.
    left, singular, right = np.linalg.svd(rows, full_matrices=False)
    kept = singular > singular.max(initial=0) * 1e-10
    coordinates = torch.from_numpy(left[:, kept] * singular[kept])
    targets = torch.from_numpy(labels.astype(np.int64))
    counts = torch.bincount(targets, minlength=num_classes)
    share = (1 / (num_classes * counts[targets])).double()  # of the mean loss
    weights = torch.zeros(coordinates.shape[1], num_classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weights, bias],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=LOSS_UNITS * GRADIENT_TOLERANCE,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> torch.Tensor:
        solver.zero_grad()
        log_probability = torch.log_softmax(coordinates @ weights + bias, dim=1)
        fit = -(share * log_probability.gather(1, targets[:, None])[:, 0]).sum()
        total = LOSS_UNITS * (fit + strength / (2 * len(rows)) * weights.square().sum())
        total.backward()
        return total

    solver.step(loss)
    found = bias.detach().numpy()
    return right[kept].T @ weights.detach().numpy(), found - found.mean()
