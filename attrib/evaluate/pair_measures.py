"""Further measures on known pairs: canonical correlations of the vectors, and calibration of the shares.

Both are about the vectors that are ranked: mapped if the method has mappers, each of length one. Both fit something,
and measure it on pairs of other source groups than it was fitted on.

<output>/theory.svg, shares.svg   the plots of the page, each by itself
"""

from dataclasses import asdict, dataclass
from functools import partial

import numpy as np

from attrib.common.errors import AttribError
from attrib.common.storage import Storage, join
from attrib.evaluate import cca
from attrib.evaluate.cca import CcaSummary
from attrib.evaluate.collection import Collection, check_comparable, read_collection, unit_rows
from attrib.evaluate.mappers import Mappers, load_mappers
from attrib.evaluate.protocol import TruthRow, places_of, read_truth
from attrib.evaluate.settings import EvaluateSettings, MeasureSettings
from attrib.evaluate.share_plots import reliability_plot
from attrib.shares import calibration
from attrib.shares.calibration import Reliability
from attrib.shares.settings import SharesSettings
from attrib.shares.shares import soft_shares

# As write_comparison takes captions: a heading, then how to read the figure.
THEORY_CAPTION = """Theory: do the vectors of a source and of what was made from it agree?
Left: correlation of sources and generated images along the directions that a linear map finds on other pairs, in \
the order in which it found them. Higher is better: that much of a source can be read off the generated image. A \
line near 0 is chance.
Right: the vectors as they are, nothing fitted. Further right, each coordinate means the same in a source and in the \
image made from it (alignment; 0 is chance). Further up, coordinates repeat each other less (whiteness; 0 is as \
unrelated as white noise). Best is up and right."""
SHARES_CAPTION = """Shares: does a source that is given 30 % hold 30 % of the truth?
Each dot is a bin of candidates: across, the share that they were given; up, the share of the truth that they hold. \
On the diagonal shares can be taken at their word; below it they promise too much, above it too little. Larger dots \
hold more candidates.
"fitted" is the calibrator of two numbers, fitted on pairs of other source groups than those that it is measured on; \
"default" is what attribution uses unless told otherwise. error: mean gap to the diagonal over candidates; \
misplaced: the part of a query's shares that would have to move; Brier: squared error of a query's shares (0 to 2). \
All three are best at 0."""


@dataclass(frozen=True)
class SharesCalibration:
    """fitted: on all pairs, the one to serve with; by_fold: what was measured in its place, each fitted without its
    fold.

    default, held_out: reliability over all queries of SharesSettings() and of by_fold, each query by the calibrator
    that has not seen its source group. given: that of a calibrator made elsewhere, without these pairs.
    """

    top_k: int
    num_groups: int
    fitted: SharesSettings
    by_fold: tuple[SharesSettings, ...]
    default: Reliability
    held_out: Reliability
    given: Reliability | None = None

    def to_dict(self) -> dict:
        scalars = [settings.model_dump() for settings in (self.fitted, *self.by_fold)]
        return asdict(self) | {"fitted": scalars[0], "by_fold": scalars[1:]}


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
    """`cca.summarise` of (source image, query) pairs of one role.

    One pair for each query, with the group of its first row of that role, and one image for each group: that of the
    least key, whatever order the files had. Raises AttribError if no row has the role, something has no vector, or the
    pairs are too few.
    """
    asked: dict[str, str] = {}
    for row in truth:
        if row.role == role:
            asked.setdefault(row.query, row.group)
    if not asked:
        roles = ", ".join(sorted({row.role for row in truth}))
        raise AttribError(f"the truth table has no row of the role {role!r}; its roles are {roles}")
    places = places_of(
        [TruthRow(query, role, group) for query, group in asked.items()], sources, queries, source_group_column
    )
    image_of: dict[int, int] = {}
    for i in sorted(range(len(sources.keys)), key=sources.keys.__getitem__):
        image_of.setdefault(int(places.group_of[i]), i)
    images = [image_of[places.code_of[group]] for group in asked.values()]
    real = unit_rows(sources.vectors[images], mappers and mappers.real, "the sources of pairs")
    rows = [places.row_of[query] for query in asked]
    synthetic = unit_rows(queries.vectors[rows], mappers and mappers.synth, "the queries of pairs")
    check_comparable(real, synthetic)
    return cca.summarise(real, synthetic, np.array(list(asked.values())), num_folds=num_folds, seed=seed)


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
    """The calibrator fitted on the truth table's queries, and its reliability on those of other source groups.

    The candidates of a query are the top_k sources by cosine, among all sources; true are those of any group that the
    table gives it, in whatever role, copies included. A query is held out with the group of its first row. Raises
    AttribError if something has no vector, or no query of a fit has a true source among its candidates.
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
    """similarity float64 [m, k] and is_true bool [m, k] of the m queries of the table, k = min(top_k, n); each one's
    first group [m]."""
    places = places_of(truth, sources, queries, source_group_column)
    wanted: dict[str, list[str]] = {}
    for row in truth:
        wanted.setdefault(row.query, []).append(row.group)
    codes = np.full((len(wanted), max(map(len, wanted.values()))), -1)
    for i, groups in enumerate(wanted.values()):
        codes[i, : len(groups)] = [places.code_of[group] for group in groups]
    anchors = unit_rows(sources.vectors, mappers and mappers.real, "the sources")
    asked = queries.vectors[[places.row_of[query] for query in wanted]]
    views = unit_rows(asked, mappers and mappers.synth, "the queries")
    check_comparable(anchors, views)
    # A generated image whose sources are known is searched as a view of the corpus is; a group is one source in several
    # copies.
    similarity, is_true = calibration.pairs_from_corpus(views, anchors, codes, places.group_of, top_k)
    return similarity, is_true, np.array([groups[0] for groups in wanted.values()])


@dataclass(frozen=True)
class PairMeasures:
    """By method. not_measured: {"theory" or "shares": {method: why}}; what could not be measured leaves the ranking as
    it is."""

    settings: MeasureSettings
    theory: dict[str, CcaSummary]
    shares: dict[str, SharesCalibration]
    not_measured: dict[str, dict[str, str]]

    @property
    def numbers(self) -> dict:
        """For evaluation.json, which holds only the measures that the settings ask for."""
        asked = {
            "theory": {"role": self.settings.theory_role},
            "shares": {"default_shares": SharesSettings().model_dump()},
        }
        return {
            name: asked[name]
            | {"num_folds": self.settings.num_folds}
            | {"methods": {method: found.to_dict() for method, found in getattr(self, name).items()}}
            | {"not_measured": refused}
            for name, refused in self.not_measured.items()
        }

    @property
    def plots(self) -> dict[str, str]:
        """{"theory" or "shares": SVG} of those that hold a method."""
        measured = {}
        for method, found in self.shares.items():
            measured |= {f"{method}, default": found.default, f"{method}, fitted": found.held_out}
            if found.given:
                measured[f"{method}, given"] = found.given
        plots = {"theory": self.theory and cca.plot(self.theory)}
        plots["shares"] = measured and reliability_plot(measured)
        return {name: svg for name, svg in plots.items() if svg}

    @property
    def figures(self) -> dict[str, str]:
        """{caption: SVG}, as `write_comparison` takes them."""
        pairs = (
            f"Pairs: one image of a {self.settings.theory_role} source, and a query; {self.settings.num_folds} folds."
        )
        fitted = "; ".join(f"{method}: {_scalars(found)}" for method, found in self.shares.items())
        captions = {
            "theory": f"{THEORY_CAPTION}\n{pairs}",
            "shares": f"{SHARES_CAPTION}\nFitted on all pairs, for the option shares of jobs.attribute: {fitted}.",
        }
        return {captions[name]: svg for name, svg in self.plots.items()}

    def lines(self) -> list[str]:
        """Results, and the reasons of missing ones, one line each."""
        lines = [
            f"theory, {method}: mean canonical correlation {np.mean(found.canonical_correlations):.3f}, alignment "
            f"{found.alignment:.3f}, whiteness {found.whiteness:.3f} ({found.num_pairs} pairs)"
            for method, found in self.theory.items()
        ]
        for method, found in self.shares.items():
            default, held_out = found.default, found.held_out
            lines.append(
                f"shares, {method}: misplaced {default.misplaced_share:.3f} by default, "
                f"{held_out.misplaced_share:.3f} fitted; "
                f"Brier {default.brier:.3f}, {held_out.brier:.3f}; {_scalars(found)}"
                + (f"; given {found.given.misplaced_share:.3f}, {found.given.brier:.3f}" if found.given else "")
            )
        refused = [(name, *item) for name, methods in self.not_measured.items() for item in methods.items()]
        return lines + [f"{name}, {method}: not measured: {why}" for name, method, why in refused]

    def write_plots(self, output: str, storage: Storage) -> None:
        """One file each; that of an earlier evaluation goes if there is none now."""
        plots = self.plots
        for name in ("theory", "shares"):
            uri = join(output, f"{name}.svg")
            if name in plots:
                storage.write_bytes(uri, plots[name].encode())
            elif storage.exists(uri):
                storage.delete_file(uri)


def measure_pairs(settings: EvaluateSettings, storage: Storage) -> PairMeasures:
    """What `settings.measures` asks for, of every method; nothing under AbC's protocol.

    A measure that a method's pairs do not allow (too few of them, for one) is named in not_measured. Memory: the
    collections of one method at a time, and three times the sources in float64.
    """
    asked, table = settings.measures, settings.truth
    wanted = {"theory": asked.theory_role is not None, "shares": asked.shares_top_k is not None}
    found: dict[str, dict] = {"theory": {}, "shares": {}}
    refused: dict[str, dict[str, str]] = {name: {} for name in wanted if wanted[name] and table is not None}
    if not refused:
        return PairMeasures(asked, **found, not_measured=refused)
    truth = read_truth(table, storage)
    for method in settings.methods:
        pairs = read_collection(method.sources, storage), read_collection(method.queries, storage), truth
        common = {
            "mappers": load_mappers(method.mapper, storage) if method.mapper else None,
            "source_group_column": table.source_group_column,
            "num_folds": asked.num_folds,
        }
        measures = {
            "theory": partial(pair_theory, *pairs, asked.theory_role, **common),
            "shares": partial(calibrate_shares, *pairs, asked.shares_top_k, given=method.shares, **common),
        }
        for name in refused:
            try:
                found[name][method.name] = measures[name]()
            except AttribError as error:
                refused[name][method.name] = str(error)
    return PairMeasures(asked, **found, not_measured=refused)


def _scalars(found: SharesCalibration) -> str:
    offset = round(found.fitted.offset, 3) + 0.0  # never -0
    return f"inverse_temperature {found.fitted.inverse_temperature:.4g}, offset {offset:g}"
