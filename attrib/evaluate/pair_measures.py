"""Further measures of known pairs: canonical correlations of the vectors (called theory) and calibration of the shares.

Both use the vectors that are ranked: mapped, if there are mappers, and of unit length. Both are measured on pairs whose
source groups were not used to fit.

<output>/theory.svg, shares.svg   the plots of the page, as separate files
"""

from collections import defaultdict
from dataclasses import asdict, dataclass

import numpy as np

from attrib.common.errors import AttribError
from attrib.common.storage import Storage, join
from attrib.evaluate import cca
from attrib.evaluate.cca import CcaSummary
from attrib.evaluate.collection import Collection, check_comparable, unit_rows
from attrib.evaluate.mappers import Mappers
from attrib.evaluate.protocol import TruthRow, places_of, read_method, read_truth
from attrib.evaluate.settings import EvaluateSettings, MeasureSettings
from attrib.pages.charts import calibration_figure, svg
from attrib.shares import calibration
from attrib.shares.calibration import Reliability
from attrib.shares.settings import SharesSettings
from attrib.shares.shares import soft_shares

# Captions for write_comparison: a heading, then how to read the figure.
THEORY_CAPTION = """Theory: do the vectors of a source and of the image made from it agree?
Left: correlations of sources and generated images of held-out pairs, along the directions that a linear map finds on \
other pairs, in the order of the fit. Higher is better: more of the source can be predicted from the generated image. \
A line near 0 is chance.
Right: the vectors themselves, without a fit. Horizontal, alignment: how well each coordinate means the same in a \
source and in the image made from it (0 is chance). Vertical, whiteness: how little coordinates repeat each other (0 \
is white noise). Best is up and right."""
SHARES_CAPTION = """Shares: does a source with a share of 30 % hold 30 % of the truth?
Each dot is a bin of candidates: their mean predicted share (horizontal) and their mean share of the truth (vertical). \
On the diagonal, shares are calibrated; below it they are too high, above it too low. Larger dots hold more candidates.
"fitted" is the calibrator of two numbers, fitted on pairs of other source groups than those that it is measured on; \
"default" is the calibrator that attribution uses without a setting. error: mean gap to the diagonal over candidates; \
misplaced: the part of a query's shares that would have to move; Brier: squared error of a query's shares (0 to 2). \
All three are best at 0."""


@dataclass(frozen=True)
class SharesCalibration:
    """Calibrators and their reliability over all queries.

    fitted: on all pairs, the one to deploy; by_fold: each fitted without its fold. default: of SharesSettings();
    held_out: of by_fold, each query with the calibrator that has not seen its source group; given: of a calibrator that
    was made without these pairs.
    """

    top_k: int
    num_groups: int
    fitted: SharesSettings
    by_fold: tuple[SharesSettings, ...]
    default: Reliability
    held_out: Reliability
    given: Reliability | None = None

    def to_dict(self) -> dict:
        by_fold = [settings.model_dump() for settings in self.by_fold]
        return asdict(self) | {"fitted": self.fitted.model_dump(), "by_fold": by_fold}

    @property
    def scalars(self) -> str:
        offset = round(self.fitted.offset, 3) + 0.0  # never -0
        return f"inverse_temperature {self.fitted.inverse_temperature:.4g}, offset {offset:g}"


def pair_theory(
    sources: Collection,
    queries: Collection,
    truth: list[TruthRow],
    role: str,
    mappers: Mappers | None = None,
    source_group_column: str = "group",
    num_folds: int = cca.NUM_FOLDS,
    seed: int = 0,
) -> CcaSummary:
    """`cca.summarise` of the (source image, query) pairs of one role.

    Each query gives one pair, with the group of its first row of that role; the group's image is that of the least key.
    Raises AttribError if no row has the role, a vector is missing, or the pairs are too few.
    """
    group_of: dict[str, str] = {}
    for row in truth:
        if row.role == role:
            group_of.setdefault(row.query, row.group)
    if not group_of:
        roles = ", ".join(sorted({row.role for row in truth}))
        raise AttribError(f"the truth table has no row of the role {role!r}; its roles are {roles}")
    rows = [TruthRow(query, role, group) for query, group in group_of.items()]
    places = places_of(rows, sources, queries, source_group_column)
    by_key = sorted(range(len(sources.keys)), key=sources.keys.__getitem__, reverse=True)
    image_of = {places.group_of[i]: i for i in by_key}  # the least key comes last and replaces the others
    images = [image_of[places.code_of[row.group]] for row in rows]
    real = unit_rows(sources.vectors[images], mappers and mappers.real, "the sources of pairs")
    asked = queries.vectors[[places.row_of[row.query] for row in rows]]
    synthetic = unit_rows(asked, mappers and mappers.synth, "the queries of pairs")
    check_comparable(real, synthetic)
    return cca.summarise(real, synthetic, np.array(list(group_of.values())), num_folds=num_folds, seed=seed)


def calibrate_shares(
    sources: Collection,
    queries: Collection,
    truth: list[TruthRow],
    top_k: int = 10,
    num_folds: int = cca.NUM_FOLDS,
    seed: int = 0,
    mappers: Mappers | None = None,
    source_group_column: str = "group",
    given: SharesSettings | None = None,
) -> SharesCalibration:
    """Fit the calibrator on the queries of the truth table, and measure it on queries of other source groups.

    The candidates of a query are the top_k of all sources by cosine. True are those of any group that the table gives
    it in any role, copies included. Folds are by the group of a query's first row. Raises AttribError if a vector is
    missing, or no query of a fit has a true source among its candidates.
    """
    similarity, is_true, groups = _candidates(sources, queries, truth, top_k, mappers, source_group_column)
    folds = cca.folds_by_group(groups, num_folds, seed)
    shares, by_fold = np.zeros(similarity.shape), []
    for fold in range(num_folds):
        out = folds == fold
        by_fold.append(calibration.fit_shares(similarity[~out], is_true[~out]))
        shares[out] = soft_shares(similarity[out], by_fold[-1])
    return SharesCalibration(
        similarity.shape[1],
        len(np.unique(groups)),
        calibration.fit_shares(similarity, is_true),
        tuple(by_fold),
        calibration.reliability(soft_shares(similarity, SharesSettings()), is_true),
        calibration.reliability(shares, is_true),
        given and calibration.reliability(soft_shares(similarity, given), is_true),
    )


def _candidates(
    sources: Collection,
    queries: Collection,
    truth: list[TruthRow],
    top_k: int,
    mappers: Mappers | None,
    source_group_column: str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """similarity float64 [m, k] and is_true bool [m, k] of m queries, k = min(top_k, n); their first groups [m]."""
    places = places_of(truth, sources, queries, source_group_column)
    groups_of: dict[str, list[str]] = defaultdict(list)
    for row in truth:
        groups_of[row.query].append(row.group)
    codes = np.full((len(groups_of), max(map(len, groups_of.values()))), -1)
    for i, groups in enumerate(groups_of.values()):
        codes[i, : len(groups)] = [places.code_of[group] for group in groups]
    anchors = unit_rows(sources.vectors, mappers and mappers.real, "the sources")
    asked = queries.vectors[[places.row_of[query] for query in groups_of]]
    views = unit_rows(asked, mappers and mappers.synth, "the queries")
    check_comparable(anchors, views)
    # The copies of a group share one id.
    similarity, is_true = calibration.pairs_from_corpus(views, anchors, codes, places.group_of, top_k)
    return similarity, is_true, np.array([groups[0] for groups in groups_of.values()])


def reliability_plot(measured: dict[str, Reliability]) -> str:
    """Reliability diagram as SVG, by name, such as default and fitted. Raises AttribError if there is none."""
    bins = {n: [(b.mean_share, b.observed_share, b.count) for b in table.bins] for n, table in measured.items()}
    captions = {
        name: f"error {table.expected_calibration_error:.4f}, misplaced {table.misplaced_share:.3f}, "
        f"Brier {table.brier:.3f}, on true sources {table.true_mass:.3f}"
        for name, table in measured.items()
    }
    return svg(calibration_figure(bins, captions), "Calibration of shares")


@dataclass(frozen=True)
class PairMeasures:
    """Measures by method. not_measured: {"theory" or "shares": {method: reason}}; this does not stop the job."""

    settings: MeasureSettings
    theory: dict[str, CcaSummary]
    shares: dict[str, SharesCalibration]
    not_measured: dict[str, dict[str, str]]

    @property
    def numbers(self) -> dict:
        """For evaluation.json: the measures that the settings ask for."""
        options = {
            "theory": {"role": self.settings.theory_role},
            "shares": {"default_shares": SharesSettings().model_dump()},
        }
        return {
            name: options[name]
            | {"num_folds": self.settings.num_folds}
            | {"methods": {method: found.to_dict() for method, found in getattr(self, name).items()}}
            | {"not_measured": refused}
            for name, refused in self.not_measured.items()
        }

    @property
    def plots(self) -> dict[str, str]:
        """{"theory" or "shares": SVG}, each if it was measured for a method."""
        measured = {}
        for method, found in self.shares.items():
            measured |= {f"{method}, default": found.default, f"{method}, fitted": found.held_out}
            if found.given:
                measured[f"{method}, given"] = found.given
        plots = {"theory": self.theory and cca.plot(self.theory), "shares": measured and reliability_plot(measured)}
        return {name: plot for name, plot in plots.items() if plot}

    @property
    def figures(self) -> dict[str, str]:
        """{caption: SVG} for `write_comparison`."""
        fitted = "; ".join(f"{method}: {found.scalars}" for method, found in self.shares.items())
        captions = {
            "theory": f"{THEORY_CAPTION}\nPairs: a query and one image of its {self.settings.theory_role} source; "
            f"{self.settings.num_folds} folds.",
            "shares": f"{SHARES_CAPTION}\nFitted on all pairs, for the option shares of jobs.attribute: {fitted}.",
        }
        return {captions[name]: plot for name, plot in self.plots.items()}

    def lines(self) -> list[str]:
        """Results, and the reasons of missing ones, one line each."""
        lines = [
            f"theory, {method}: mean canonical correlation {np.mean(found.canonical_correlations):.3f}, alignment "
            f"{found.alignment:.3f}, whiteness {found.whiteness:.3f} ({found.num_pairs} pairs)"
            for method, found in self.theory.items()
        ]
        for method, found in self.shares.items():
            default, held_out, given = found.default, found.held_out, found.given
            lines.append(
                f"shares, {method}: misplaced {default.misplaced_share:.3f} by default, {held_out.misplaced_share:.3f} "
                f"fitted; Brier {default.brier:.3f}, {held_out.brier:.3f}; {found.scalars}"
                + (f"; given {given.misplaced_share:.3f}, {given.brier:.3f}" if given else "")
            )
        for name, refused in self.not_measured.items():
            lines += [f"{name}, {method}: not measured: {reason}" for method, reason in refused.items()]
        return lines

    def write_plots(self, output: str, storage: Storage) -> None:
        """Write one file per plot, and delete the plots of an earlier evaluation that this one does not have."""
        plots = self.plots
        for name in ("theory", "shares"):
            uri = join(output, f"{name}.svg")
            if name in plots:
                storage.write_bytes(uri, plots[name].encode())
            elif storage.exists(uri):
                storage.delete_file(uri)


def measure_pairs(settings: EvaluateSettings, storage: Storage) -> PairMeasures:
    """Measure every method as `settings.measures` asks; nothing under AbC's protocol.

    Memory: the collections of one method, and three times its sources in float64.
    """
    asked, table = settings.measures, settings.truth
    wanted = {"theory": asked.theory_role is not None, "shares": asked.shares_top_k is not None}
    found = PairMeasures(asked, {}, {}, {name: {} for name in wanted if wanted[name] and table is not None})
    truth = read_truth(table, storage) if found.not_measured else []
    for method in settings.methods if truth else ():
        sources, queries, mappers = read_method(method, storage)
        pairs = sources, queries, truth
        grouped = table.source_group_column
        options = {"mappers": mappers, "source_group_column": grouped, "num_folds": asked.num_folds}
        for name, refused in found.not_measured.items():
            try:
                if name == "theory":
                    found.theory[method.name] = pair_theory(*pairs, asked.theory_role, **options)
                else:
                    found.shares[method.name] = calibrate_shares(
                        *pairs, asked.shares_top_k, given=method.shares, **options
                    )
            except AttribError as error:
                refused[method.name] = str(error)
    return found
