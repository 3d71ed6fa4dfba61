"""One verdict per image: consistent with a registered generator, with a family of them, unknown, or not assessable, with the reason.

An image is said to be consistent with a generator where two things hold: hardly any image that no registered generator made would stand so
high (p_value at most false_attribution_rate; for an image drawn as the negatives are, which is not what a generator is that nobody knows:
`Judge.left_out_rates` shows how that fares), and the image is as like the generator's references as they are like each other
(own_p_value above false_rejection_rate). "Consistent with" is all that it says: nothing proves that the generator made it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

from attrib.common.errors import AttribError
from attrib.common.storage import Storage
from attrib.generators.fingerprints.base import Method
from attrib.generators.identify.calibration import KINDS, ORIGINS, Calibration, best_of, calibrate, first_in, gallery_of
from attrib.generators.registry.galleries import Galleries
from attrib.generators.registry.quality import refusal
from attrib.generators.registry.registry import Registry
from attrib.generators.registry.settings import VerdictSettings
from attrib.generators.signals.samples import Sample

KNOWN, FAMILY, UNKNOWN, UNASSESSABLE = "known", "family", "unknown", "unassessable"
POWER_LEVEL = 0.05  # of the test whether references under a degradation are recognised at all
FAMILY_SEPARATOR = "|"
# What is unlike all that is registered may be nearest to references that were degraded beyond recognition, as an image is that was degraded so.
UNLIKE = "degraded, or of no registered generator"
MISSING = (  # kinds of negatives, what is said where there are none, and how they are registered
    ("photographs", "a photograph", "photographs"),
    ("generators", "of another generator", "other-generator"),
    ("synthetic", "of a synthetic model", "synthetic"),
)


@dataclass(frozen=True)
class Verdict:
    """generator: the name, or the names of a family; None unless known or family. nearest: the best generator, whatever the verdict.

    margin: score above that of the best generator of another family; None without one. gallery: the degradation whose references were
    nearest. Scores and p-values are None where the image has no fingerprint.
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
    """Of m rows of scores. best, gallery: int64, generator and gallery of the highest; attributed: bool, whether both tests say so; the rest
    float64, score and margin (within the gallery) as the method gives them."""

    best: np.ndarray
    gallery: np.ndarray
    attributed: np.ndarray
    score: np.ndarray
    margin: np.ndarray
    p_value: np.ndarray
    own_p_value: np.ndarray


class Judge:
    """A calibrated registry. `families` names the families in the order of `confusion`, whose last row and column are all else.

    confusion: float64 [galleries, J, J], how many of the references of each family (left out in turn) and of the negatives (all kinds
    counting the same) that went to a gallery get which verdict. floor: the least p-value that can come out in any gallery. assessable: bool
    [galleries], whether references that go there are recognised at all; recognised: float64 [galleries], the share of them that is, of all
    families together. Where it is small, an image can still be attributed, but that it is not says little: it is then unassessable.
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
        """Why nothing that goes to a gallery can be attributed at the configured rate, or None."""
        calibration, rate = self.calibration, self.settings.false_attribution_rate
        if calibration.floors[gallery] <= rate + 1e-12:
            return None
        unit, units = self.settings.unit, calibration.origin_units
        needed = int(np.ceil(calibration.strata[gallery].itself / rate - 1e-9)) - 1
        if not calibration.is_generated:
            return f"no negative was generated: register synthetic models (role: synthetic) or other generators, {needed} {unit}s or more"
        few = [origin for origin in range(len(ORIGINS)) if 0 < units[origin] < needed]
        have = " and ".join(f"{round(units[origin])} {ORIGINS[origin]} (by {unit})" for origin in few)
        remedies = ("photographs", "references or other generators", "synthetic models")
        if unit == "source":
            remedies = ("photographs", "synthetic models or other generators", "")
        return (
            f"false_attribution_rate {rate:g} is below {calibration.floors[gallery]:.3g}, the least that {have} can show; register "
            f"{needed} or more of {' and of '.join(remedies[origin] for origin in few)} (max_images and images_per_model say how many are "
            "kept), or raise the rate"
        )

    @cached_property
    def warnings(self) -> list[str]:
        """What the rates are not promised for: other generators where none is among the negatives, and the own images of one with few references."""
        calibration, rate = self.calibration, self.settings.false_rejection_rate
        needed = int(np.ceil(1 / rate - 1e-9)) - 1
        found = [
            f"{name} has {round(1 / floor) - 1} references, which reject no image at false_rejection_rate {rate:g}; register {needed} or more"
            for name, floor in zip(calibration.names, calibration.own_floors[0])
            if floor > rate + 1e-12
        ]
        if calibration.is_generated:
            there = calibration.units()
            found += [
                f"no negative is {what}: the false_attribution_rate is not promised for such images; register some (role: {role})"
                for kind, what, role in MISSING
                if kind not in there
            ]
        return found

    @cached_property
    def left_out_rates(self) -> dict[str, float]:
        """Of each family's references, untouched, the share that would be attributed to another generator if the family were not registered.

        What the rate is for a generator that nobody knows, from the few that are known. Families are left out where the others can
        attribute anything.
        """
        found = {}
        for head, name in zip(self.heads, self.families):
            rest, scores = self.calibration.without(int(head))
            there = ~np.isnan(scores[0]).all(axis=(1, 2))
            if there.any() and rest.floor <= self.settings.false_attribution_rate + 1e-12:
                found[name] = float(decide(rest, scores[0, there]).attributed.mean())
        return found

    def decide(
        self, scores: np.ndarray, negative: np.ndarray | None = None, reference: np.ndarray | None = None
    ) -> Decisions:
        """As `decide`, by this judge's calibration."""
        return decide(self.calibration, scores, negative, reference)

    def label(self, decisions: Decisions) -> np.ndarray:
        """int64 [m]: place among `families`, their number for all that is not attributed."""
        place = np.searchsorted(self.heads, self.calibration.family[decisions.best])
        return np.where(decisions.attributed, place, len(self.heads))

    def verdicts(self, vectors: np.ndarray) -> list[Verdict]:
        """vectors: float32 [n, d], unit rows."""
        if not len(vectors):
            return []
        decisions = self.decide(self.galleries.scores(vectors))
        labels = self.label(decisions)
        return [self._verdict(i, decisions, labels[i]) for i in range(len(vectors))]

    def _verdict(self, i: int, decisions: Decisions, label: int) -> Verdict:
        p_value, own_p_value = float(decisions.p_value[i]), float(decisions.own_p_value[i])
        nearest, margin = self.calibration.names[decisions.best[i]], float(decisions.margin[i])
        gallery = int(decisions.gallery[i])
        degradation, generator = self.calibration.degradations[gallery], None
        rate, own_rate = self.settings.false_attribution_rate, self.settings.false_rejection_rate
        if abstains := self.abstains:
            kind, reason = UNASSESSABLE, abstains
        elif too_few := self._too_few(gallery):
            kind, reason = UNASSESSABLE, f"of images like those under {degradation}: {too_few}"
        elif not self.assessable[gallery]:
            degraded = "even untouched," if gallery == 0 else f"{UNLIKE}: under {degradation}"
            kind, reason = UNASSESSABLE, f"{degraded} the generators' own references are not recognised"
        elif label < len(self.heads):
            kind, generator = (KNOWN if self.family_sizes[label] == 1 else FAMILY), self.families[label]
            reason = None if kind == KNOWN else "the references of these generators cannot be told apart"
        elif self.recognised[gallery] < self.settings.least_recognised:
            kind = UNASSESSABLE
            share = f"{self.recognised[gallery]:.0%} of the generators' own references are recognised"
            reason = f"{UNLIKE}: under {degradation} only {share}" if gallery else f"even untouched, only {share}"
        elif p_value > rate:
            kind = UNKNOWN
            reason = f"nearest is {nearest}, but images of other origin score as high (p {p_value:.3g} > {rate:g})"
        else:
            kind = UNKNOWN
            reason = f"nearest is {nearest}, but its own references are more like each other (p {own_p_value:.3g} <= {own_rate:g})"
        return Verdict(
            kind=kind,
            generator=generator,
            nearest=nearest,
            score=float(decisions.score[i]),
            margin=margin if np.isfinite(margin) else None,
            p_value=p_value,
            own_p_value=own_p_value,
            gallery=degradation,
            reason=reason,
        )

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
                found = self.label(self.decide(calibration.own[degradation[places], places], reference=places))
                np.add.at(confusion[gallery], (true, found), 1)
                num_right = int((true == found).sum())
                p_value = stats.binom.sf(num_right - 1, len(places), self.settings.false_attribution_rate)
                assessable[gallery] = p_value <= POWER_LEVEL
            confusion[gallery, -1] = self._of_negatives(first_in(chosen, gallery))
        return confusion, assessable

    def _of_negatives(self, degradation: np.ndarray) -> np.ndarray:
        """float64 [J]: verdicts of the negatives, each under a degradation [n] (none: -1) and left out in turn; every kind scaled to the smallest
        one's number."""
        rows, kinds = np.zeros(len(self.heads) + 1), []
        for kind in range(len(KINDS)):
            places = np.flatnonzero((self.calibration.kind == kind) & (degradation >= 0))
            if len(places):
                scores = self.calibration.negatives[degradation[places], places]
                labels = self.label(self.decide(scores, negative=places))
                kinds.append(np.bincount(labels, minlength=len(rows)))
        smallest = min((counts.sum() for counts in kinds), default=0)
        for counts in kinds:
            rows += counts * smallest / counts.sum()
        return rows


def decide(
    calibration: Calibration,
    scores: np.ndarray,
    negative: np.ndarray | None = None,
    reference: np.ndarray | None = None,
) -> Decisions:
    """scores: float32 [m, galleries, G]. negative, reference: int64 [m], the rows' own places where they are negatives, or references,
    themselves."""
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
    """Raises AttribError if no generator is registered; MismatchError if the method is not the registry's."""
    if not registry.generators:
        raise AttribError(f"{registry.uri} has no generator; register one with jobs.registry, role: generator")
    return Judge(*calibrate(registry, method, settings, storage))


def assess(samples: Sequence[Sample], judge: Judge) -> tuple[list[Verdict], np.ndarray]:
    """A verdict of each sample and its fingerprint, float32 [n, d], nan where it has none."""
    method = judge.galleries.method
    reasons = [refusal(sample, method, judge.settings) for sample in samples]
    usable = [i for i, reason in enumerate(reasons) if reason is None]
    vectors = np.full((len(samples), judge.galleries.references[0].shape[2]), np.nan, np.float32)
    if usable:
        vectors[usable] = method.embed([samples[i] for i in usable])
    verdicts = [Verdict(UNASSESSABLE, reason=reason) for reason in reasons]
    # A direction that does not exist, as of a picture without any residual, is no fingerprint.
    usable = [i for i in usable if np.isfinite(vectors[i]).all() and vectors[i].any()]
    for i in set(range(len(samples))) - set(usable):
        vectors[i] = np.nan
        if reasons[i] is None:
            verdicts[i] = Verdict(UNASSESSABLE, reason="blank: it leaves no fingerprint")
    for i, verdict in zip(usable, judge.verdicts(vectors[usable])):
        verdicts[i] = verdict
    return verdicts, vectors
