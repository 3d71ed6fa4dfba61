"""Calibrations and judges from given scores and vectors, without a registry."""

import numpy as np

from attrib.generators.identify.calibration import Calibration
from attrib.generators.identify.verdicts import Judge
from attrib.generators.registry.galleries import Galleries
from attrib.generators.registry.settings import VerdictSettings
from support.generators import Vectors, around, unit

SYNTHETIC = 2


def calibration_of(negatives, kind=None, source=None, own=None, owner=None, family=None, **settings) -> Calibration:
    """A calibration from scores.

    negatives: [n, G] for one gallery, or [D, n, D, G]; kind: synthetic by default. own: scores of the references; by
    default one reference per generator, which scores 6 for its own generator.
    """
    negatives = np.asarray(negatives, np.float32)
    if negatives.ndim == 2:
        negatives = negatives[None, :, None]
    num_degradations, count, _, num_generators = negatives.shape
    if own is None:
        own = np.full((num_degradations, num_generators, num_degradations, num_generators), 6.0)
    return Calibration(
        names=[f"g{g}" for g in range(num_generators)],
        degradations=("none", "jpeg-85", "jpeg-70", "webp-85", "blur-1")[:num_degradations],
        family=np.arange(num_generators) if family is None else family,
        negatives=negatives,
        kind=np.full(count, SYNTHETIC) if kind is None else kind,
        source=np.arange(count) if source is None else source,
        own=own,
        owner=np.arange(own.shape[1]) if owner is None else owner,
        settings=VerdictSettings(**settings),
    )


def judge_from(groups, negatives, family=None, with_references=False, **settings) -> Judge:
    """groups: float32 [D, r, d] per generator; negatives: float32 [n, d], negatives of kind synthetic, not degraded.

    with_references: use the references of the groups as negatives, too.
    """
    galleries = Galleries(Vectors(), groups)
    own, owner = galleries.leave_one_out()
    scores = np.stack([galleries.scores(negatives)] * groups[0].shape[0])
    kind, source = np.full(len(negatives), SYNTHETIC), len(groups) + np.arange(len(negatives))
    if with_references:
        scores = np.concatenate([galleries.as_unregistered(np.arange(len(groups))), scores], axis=1)
        kind, source = np.append(np.ones(len(owner), int), kind), np.append(owner, source)
    return Judge(galleries, calibration_of(scores, kind, source, own=own, owner=owner, family=family, **settings))


def groups_and_negatives() -> tuple:
    """Random generator, centres of four generators, 20 references each of three (two are equal), and 60 negatives."""
    generator = np.random.default_rng(8)
    centres = unit(generator.standard_normal((4, 24)))
    groups = [around(centres[c], 20, 0.12, generator)[None] for c in (0, 1, 1)]
    return generator, centres, groups, unit(generator.standard_normal((60, 24)))
