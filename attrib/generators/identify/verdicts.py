"""The verdict on an image and its reason: known, family, unknown or unassessable.

An image is attributed to a generator (known) or to a family of generators if it passes two tests: the conformal p-value
of its score among the negatives is at most `false_attribution_rate`, and the p-value among the generator's own
references is above `false_rejection_rate`. If one of the tests fails, the image is unknown.

An image is unassessable if it cannot be read (rows.py), is refused (registry/quality.py) or has no fingerprint
(`assess`); if there are too few negatives; or if it is not attributed and few references under its degradation are
recognised (`Judge._verdict`).

The rate holds for images drawn from the same distribution as the negatives. An unknown generator may be different from
them: for each registered generator, `Judge.left_out_rates` reports the rate that it would have if it were unknown. A
verdict says that an image is consistent with a generator. It does not prove that the generator made it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

from attrib.common.errors import AttribError
from attrib.common.storage import Storage
from attrib.generators.fingerprints.base import Method
from attrib.generators.identify.calibration import (
    KINDS,
    ORIGINS,
    Calibration,
    Negatives,
    best_of,
    calibrated,
    first_in,
    gallery_of,
)
from attrib.generators.registry.galleries import Galleries
from attrib.generators.registry.quality import refusal
from attrib.generators.registry.registry import Registry, fingerprint_or_nan
from attrib.generators.registry.settings import VerdictSettings
from attrib.generators.signals.samples import Sample

KNOWN, FAMILY, UNKNOWN, UNASSESSABLE = "known", "family", "unknown", "unassessable"
POWER_LEVEL = 0.05  # of the test whether references under a degradation are recognised more often than by chance
FAMILY_SEPARATOR = "|"
# An out-of-distribution image can still be nearest to heavily degraded references, because heavy degradation makes all
# images alike.
OUTLIER = "degraded or from an unknown generator"
MISSING = (  # kind of negatives, name in the warning, role to register
    ("photographs", "photographs", "photographs"),
    ("generators", "images of other generators", "other-generator"),
    ("synthetic", "images of synthetic models", "synthetic"),
)
REMEDIES = {  # negatives to register, by unit and origin
    "image": ("photographs", "images of generators", "images of synthetic models"),
    "source": ("photographs", "synthetic models or other generators"),
}


@dataclass(frozen=True)
class Verdict:
    """The verdict on one image; fields are columns of a verdict part (attrib/generators/identify/files.py).

    margin: None if there is no other family. Scores and p-values are None if the image has no fingerprint.
    """

    kind: str
    generator: str | None = None
    nearest: str | None = None
    score: float | None = None
    margin: float | None = None
    p_value: float | None = None
    own_p_value: float | None = None
    gallery: str | None = None
    reason: str | None = None


@dataclass(frozen=True, eq=False)
class Decisions:
    """Decisions on m rows of scores, before verdicts.

    best, gallery: int64, generator and gallery of the highest score. attributed: bool, whether both tests are passed.
    margin: float64, score minus that of the best generator of another family in the gallery.
    """

    best: np.ndarray
    gallery: np.ndarray
    attributed: np.ndarray
    score: np.ndarray
    margin: np.ndarray
    p_value: np.ndarray
    own_p_value: np.ndarray


class Judge:
    """A calibrated registry that gives verdicts.

    confusion: float64 [galleries, J, J], number of leave-one-out verdicts by true family and verdict, in the order of
    `families`; the last row and column are all other origins, where each kind of negatives has the same weight. floor:
    smallest possible p-value. assessable: bool [galleries], whether references are recognised more often than by
    chance. recognised: float64 [galleries], share of references that are recognised.
    """

    def __init__(self, galleries: Galleries, calibration: Calibration):
        self.galleries, self.calibration, self.settings = galleries, calibration, calibration.settings
        self.heads = np.unique(calibration.family)  # the first generator of each family
        members = [np.flatnonzero(calibration.family == head) for head in self.heads]
        self.families = [FAMILY_SEPARATOR.join(calibration.names[g] for g in group) for group in members]
        self.family_sizes = [len(group) for group in members]
        self.floor = calibration.floor
        self.confusion, self.assessable = self._left_out()
        own = self.confusion[:, :-1, :-1]
        right, count = np.trace(own, axis1=1, axis2=2), self.confusion[:, :-1].sum(axis=(1, 2))
        self.recognised = right / np.maximum(count, 1)

    @property
    def abstains(self) -> str | None:
        """Why nothing can be attributed at the configured rate, or None."""
        return self._too_few(int(self.calibration.floors.argmin()))

    def _too_few(self, gallery: int) -> str | None:
        """Why no image in this gallery can be attributed at the configured rate, or None."""
        calibration, rate = self.calibration, self.settings.false_attribution_rate
        if calibration.floors[gallery] <= rate + 1e-12:
            return None
        unit, units = self.settings.unit, calibration.origin_units
        needed = int(np.ceil(calibration.strata[gallery].rows_per_negative / rate - 1e-9)) - 1
        if not calibration.is_generated:
            return (
                "no generated negatives are registered: register synthetic models (role: synthetic) or other "
                f"generators, {needed} {unit}s or more"
            )
        few = [origin for origin in range(len(ORIGINS)) if 0 < units[origin] < needed]
        counted = "sources of " if unit == "source" else ""
        have = " and ".join(f"{round(units[origin])} {counted}{ORIGINS[origin]}" for origin in few)
        remedy = " and ".join(f"{needed} or more {REMEDIES[unit][origin]}" for origin in few)
        return (
            f"false_attribution_rate {rate:g} is below {calibration.floors[gallery]:.3g}, the smallest p-value that "
            f"{have} allow; register {remedy} (max_images and images_per_model limit how many are kept), or raise the "
            "rate"
        )

    @cached_property
    def warnings(self) -> list[str]:
        """Warnings about generators with too few references to reject an image, and missing kinds of negatives."""
        calibration, rate = self.calibration, self.settings.false_rejection_rate
        needed = int(np.ceil(1 / rate - 1e-9)) - 1
        found = [
            f"{name} has {round(1 / floor) - 1} references, too few to reject an image at false_rejection_rate "
            f"{rate:g}; register {needed} or more"
            for name, floor in zip(calibration.names, calibration.own_floors[0])
            if floor > rate + 1e-12
        ]
        if calibration.is_generated:
            found += [
                f"the negatives contain no {what}: false_attribution_rate may not hold for such images; register some "
                f"(role: {role})"
                for kind, what, role in MISSING
                if kind not in calibration.units()
            ]
        return found

    @cached_property
    def left_out_rates(self) -> dict[str, float]:
        """{family: share of its undegraded references that would be attributed if the family were not registered}.

        This estimates the false attribution rate of an unknown generator. A family is missing if nothing could be
        attributed without it.
        """
        found = {}
        for head, name in zip(self.heads, self.families):
            rest, scores = self.calibration.without(int(head))
            there = ~np.isnan(scores[0]).all(axis=(1, 2))
            if there.any() and rest.floor <= self.settings.false_attribution_rate + 1e-12:
                found[name] = float(decide(rest, scores[0, there]).attributed.mean())
        return found

    def label(self, decisions: Decisions) -> np.ndarray:
        """int64 [m]: index into `families`; len(families) for images that are not attributed."""
        place = np.searchsorted(self.heads, self.calibration.family[decisions.best])
        return np.where(decisions.attributed, place, len(self.heads))

    def verdicts(self, vectors: np.ndarray) -> list[Verdict]:
        """Verdicts on images with these fingerprints, unit rows float32 [n, d]."""
        if not len(vectors):
            return []
        decisions = decide(self.calibration, self.galleries.scores(vectors))
        labels = self.label(decisions)
        return [self._verdict(i, decisions, labels[i]) for i in range(len(vectors))]

    def _verdict(self, i: int, decisions: Decisions, label: int) -> Verdict:
        p_value, own_p_value = float(decisions.p_value[i]), float(decisions.own_p_value[i])
        nearest, margin = self.calibration.names[decisions.best[i]], float(decisions.margin[i])
        gallery, generator = int(decisions.gallery[i]), None
        degradation, share = self.calibration.degradations[gallery], self.recognised[gallery]
        rate, own_rate = self.settings.false_attribution_rate, self.settings.false_rejection_rate
        lost = f"{OUTLIER}: under {degradation}" if gallery else "fingerprint too weak: even without degradation"
        if abstains := self.abstains:
            kind, reason = UNASSESSABLE, abstains
        elif too_few := self._too_few(gallery):
            kind, reason = UNASSESSABLE, f"too few negatives under {degradation}: {too_few}"
        elif not self.assessable[gallery]:
            kind, reason = UNASSESSABLE, f"{lost}, the generators' own references are not recognised"
        elif label < len(self.heads):
            kind, generator = (KNOWN if self.family_sizes[label] == 1 else FAMILY), self.families[label]
            reason = None if kind == KNOWN else "the references of these generators cannot be told apart"
        elif share < (least := self.settings.least_recognised):
            recognised = f"only {share:.0%} of the generators' own references are recognised"
            kind, reason = UNASSESSABLE, f"{lost}, {recognised} (least_recognised: {least:.0%})"
        else:
            kind = UNKNOWN
            cause = f"its own references score higher (p {own_p_value:.3g} <= {own_rate:g})"
            if not len(self.calibration.own_scores(gallery, decisions.best[i])):
                cause = f"it has too few references under degradation {degradation} to test the score"
            elif p_value > rate:
                cause = f"images of other origins score as high (p {p_value:.3g} > {rate:g})"
            reason = f"the nearest generator is {nearest}, but {cause}"
        score, gap = float(decisions.score[i]), margin if np.isfinite(margin) else None
        return Verdict(kind, generator, nearest, score, gap, p_value, own_p_value, degradation, reason)

    def _left_out(self) -> tuple[np.ndarray, np.ndarray]:
        calibration, size = self.calibration, len(self.heads) + 1
        confusion = np.zeros((len(calibration.degradations), size, size))
        assessable = np.zeros(len(calibration.degradations), bool)
        own_chosen, chosen = gallery_of(calibration.own), gallery_of(calibration.negatives)
        for gallery in range(len(calibration.degradations)):
            degradation = first_in(own_chosen, gallery)
            places = np.flatnonzero(degradation >= 0)
            if len(places):
                true = np.searchsorted(self.heads, calibration.family[calibration.owner[places]])
                found = self.label(decide(calibration, calibration.own[degradation[places], places], reference=places))
                np.add.at(confusion[gallery], (true, found), 1)
                num_right = int((true == found).sum())
                p_value = stats.binom.sf(num_right - 1, len(places), self.settings.false_attribution_rate)
                assessable[gallery] = p_value <= POWER_LEVEL
            confusion[gallery, -1] = self._of_negatives(first_in(chosen, gallery))
        return confusion, assessable

    def _of_negatives(self, degradation: np.ndarray) -> np.ndarray:
        """float64 [J]: number of leave-one-out verdicts of the negatives, each kind scaled to the size of the smallest.

        degradation: int64 [n], the degradation under which each negative is used, -1: not used.
        """
        kinds = []
        for kind in range(len(KINDS)):
            places = np.flatnonzero((self.calibration.kind == kind) & (degradation >= 0))
            if len(places):
                scores = self.calibration.negatives[degradation[places], places]
                labels = self.label(decide(self.calibration, scores, negative=places))
                kinds.append(np.bincount(labels, minlength=len(self.heads) + 1))
        smallest = min((counts.sum() for counts in kinds), default=0)
        return sum((counts * smallest / counts.sum() for counts in kinds), np.zeros(len(self.heads) + 1))


def decide(calibration: Calibration, scores: np.ndarray, negative=None, reference=None) -> Decisions:
    """Best generator, gallery and the results of both tests for each row of scores, float32 [m, galleries, G].

    negative, reference: int64 [m] or None; for rows that are negatives or references their indices, to leave them out.
    """
    at, gallery = np.arange(len(scores)), gallery_of(scores)
    inside = scores[at, gallery]
    best = best_of(inside)
    related = calibration.family[best][:, None] == calibration.family[None, :]
    others = np.where(related | np.isnan(inside), -np.inf, inside).max(axis=1).astype(np.float64)
    score = inside[at, best].astype(np.float64)
    p_value = calibration.p_values(inside, gallery, exclude=negative)
    own = calibration.own_p_values(inside[at, best], gallery, best, exclude=reference)
    settings = calibration.settings
    attributed = (p_value <= settings.false_attribution_rate + 1e-12) & (own > settings.false_rejection_rate)
    return Decisions(best, gallery, attributed, score, score - others, p_value, own)


def judge_of(registry: Registry, method: Method, settings: VerdictSettings, storage: Storage) -> Judge:
    """The judge of a registry. Raises AttribError without a generator, MismatchError for another method."""
    if not registry.generators:
        raise AttribError(f"{registry.uri} has no generator; register one with jobs.registry, role: generator")
    registry.check_method(method)
    galleries = Galleries(method, [registry.read(entry, storage) for entry in registry.generators])
    negatives = [Negatives(registry.read(e, storage), e.role, e.source_sizes) for e in registry.negatives]
    names = [entry.name for entry in registry.generators]
    return Judge(galleries, calibrated(galleries, names, negatives, registry.degradations, settings))


def assess(samples: Sequence[Sample], judge: Judge) -> tuple[list[Verdict], np.ndarray]:
    """Verdicts on samples, and their fingerprints float32 [n, d], nan for a sample without one."""
    method = judge.galleries.method
    reasons = [refusal(sample, method, judge.settings) for sample in samples]
    usable = [i for i, reason in enumerate(reasons) if reason is None]
    vectors = np.full((len(samples), judge.galleries.references[0].shape[2]), np.nan, np.float32)
    if usable:
        vectors[usable] = [fingerprint_or_nan(row) for row in method.embed([samples[i] for i in usable])]
    blank = "blank: the image has no residual, so it has no fingerprint"
    verdicts = [Verdict(UNASSESSABLE, reason=reason or blank) for reason in reasons]
    there = np.flatnonzero(np.isfinite(vectors).all(axis=1))
    for i, verdict in zip(there, judge.verdicts(vectors[there])):
        verdicts[i] = verdict
    return verdicts, vectors
