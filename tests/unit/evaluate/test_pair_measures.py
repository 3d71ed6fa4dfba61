"""Theory and shares of known pairs: equal to loops over the truth table, without leaks between folds, and as files."""

import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest
from support.pairs import drawn_case, evaluate_by_job, in_memory, unit, write_case

from attrib.common.config import validate
from attrib.common.errors import AttribError
from attrib.evaluate import cca, pair_measures
from attrib.evaluate.collection import Collection
from attrib.evaluate.mappers import LinearMapper, Mappers
from attrib.evaluate.pair_measures import (
    PairMeasures,
    calibrate_shares,
    measure_pairs,
    pair_theory,
    reliability_plot,
)
from attrib.evaluate.protocol import TruthRow, evaluate
from attrib.evaluate.settings import EvaluateSettings
from attrib.pages.charts import calibration_figure
from attrib.shares import calibration
from attrib.shares.settings import SharesSettings
from attrib.shares.shares import soft_shares

NUM_FOLDS, TOP_K = 5, 6


def many_in_memory(num_queries: int = 600) -> tuple[Collection, Collection, list[TruthRow]]:
    """120 sources, one per group, and queries so near to one of them that the default shares are not sharp enough."""
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((120, 48)) + 8
    wanted = rng.integers(0, 120, num_queries)
    queries = [f"q{i}" for i in range(num_queries)]
    near = vectors[wanted] + 0.9 * rng.standard_normal((num_queries, 48))
    truth = [TruthRow(query, "content", f"g{w}") for query, w in zip(queries, wanted)]
    return (
        Collection([f"s{i}" for i in range(120)], vectors, {"group": [f"g{i}" for i in range(120)]}),
        Collection(queries, near),
        truth,
    )


def shuffled(collection: Collection, seed: int) -> Collection:
    order = np.random.default_rng(seed).permutation(len(collection.keys))
    metadata = {name: [values[i] for i in order] for name, values in collection.metadata.items()}
    return Collection([collection.keys[i] for i in order], collection.vectors[order], metadata)


@pytest.mark.parametrize("role", ["content", "style"])
def test_theory_uses_one_pair_per_query_of_the_role(role):
    sources, queries, truth = in_memory()
    # A second group in the same role adds no pair.
    extra = TruthRow(truth[0].query, "content", next(row.group for row in truth if row.group != truth[0].group))
    real, synthetic, groups, seen = [], [], [], set()
    for query, of_role, group in truth:
        if of_role == role and query not in seen:
            seen.add(query)
            image = min(key for key, g in zip(sources.keys, sources.column("group")) if g == group)
            real.append(unit(sources.vectors[sources.keys.index(image)]))
            synthetic.append(unit(queries.vectors[queries.keys.index(query)]))
            groups.append(group)
    expected = cca.summarise(np.stack(real), np.stack(synthetic), np.array(groups), num_folds=4, seed=3)
    # The order of the files does not matter.
    found = pair_theory(shuffled(sources, 1), shuffled(queries, 2), [*truth, extra], role, num_folds=4, seed=3)
    for name in ("canonical_correlations", "fitted_correlations", "alignment", "diagonal_share", "whiteness"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-9)
    assert found.num_pairs == len(seen) > 60 and found.real.num_rows == expected.real.num_rows
    assert found.num_groups == len(set(groups))


def by_hand(sources: Collection, queries: Collection, truth, top_k: int):
    """Candidates of each query, by sorting all cosines of one query at a time."""
    similarity, is_true, first = [], [], {}
    for row in truth:
        first.setdefault(row.query, row.group)
    for query in first:
        mine = {row.group for row in truth if row.query == query}
        asked = unit(queries.vectors[queries.keys.index(query)])
        found = [(float(unit(v) @ asked), group in mine) for v, group in zip(sources.vectors, sources.column("group"))]
        found.sort(key=lambda item: -round(item[0], 12))
        similarity.append([s for s, _ in found[:top_k]])
        is_true.append([t for _, t in found[:top_k]])
    return np.array(similarity), np.array(is_true), list(first.values())


def relu_shares(row, settings: SharesSettings) -> list[float]:
    kept = [max(math.exp((s - max(row)) * settings.inverse_temperature) + 0.001 * settings.offset, 0.0) for s in row]
    return [value / sum(kept) for value in kept]


def test_shares_are_measured_on_held_out_folds():
    sources, queries, truth = in_memory()
    similarity, is_true, groups = by_hand(sources, queries, truth, TOP_K)
    assert 0 < is_true.any(axis=1).sum() < len(is_true) and is_true.sum(axis=1).max() > 1
    found = calibrate_shares(sources, queries, truth, TOP_K, NUM_FOLDS, seed=2)
    folds = cca.folds_by_group(np.array(groups), NUM_FOLDS, seed=2)
    brier = {"default": [], "held_out": []}
    for row, true, fold in zip(similarity.tolist(), is_true.tolist(), folds.tolist()):
        target = [t / max(sum(true), 1) for t in true]
        for name, settings in (("default", SharesSettings()), ("held_out", found.by_fold[fold])):
            brier[name].append(sum((s - t) ** 2 for s, t in zip(relu_shares(row, settings), target)))
    for fold in range(NUM_FOLDS):
        rest = folds != fold
        fitted = calibration.fit_shares(similarity[rest], is_true[rest])
        assert found.by_fold[fold].inverse_temperature == pytest.approx(fitted.inverse_temperature, rel=1e-4)
    assert found.default.brier == pytest.approx(np.mean(brier["default"]), abs=1e-9)
    assert found.held_out.brier == pytest.approx(np.mean(brier["held_out"]), abs=1e-6)
    assert found.fitted.inverse_temperature == pytest.approx(
        calibration.fit_shares(similarity, is_true).inverse_temperature, rel=1e-4
    )
    assert (found.top_k, found.num_groups, found.held_out.num_queries) == (TOP_K, len(set(groups)), len(groups))
    assert found.held_out.num_without_truth == int((~is_true.any(axis=1)).sum())


def test_no_group_is_both_fitted_and_held_out(monkeypatch):
    """The fit for a query must exclude all queries with its first group. A spy records what each fit is given."""
    sources, queries, truth = many_in_memory(300)
    similarity, _, groups = by_hand(sources, queries, truth, TOP_K)
    given, fit = [], calibration.fit_shares
    monkeypatch.setattr(calibration, "fit_shares", lambda s, t: (given.append(s[:, 0].round(9)), fit(s, t))[1])
    found = calibrate_shares(sources, queries, truth, TOP_K, NUM_FOLDS)
    assert len(given) == NUM_FOLDS + 1 == len(found.by_fold) + 1
    group_of = dict(zip(similarity[:, 0].round(9).tolist(), groups))
    assert len(group_of) == 300
    left_out = []
    for fitted_on in given[:NUM_FOLDS]:
        inside = {group_of[s] for s in fitted_on.tolist()}
        outside = {group_of[s] for s in set(group_of) - set(fitted_on.tolist())}
        assert outside and not inside & outside
        left_out += sorted(outside)
    assert sorted(left_out) == sorted(set(groups))
    assert len(given[-1]) == 300

    # The same check detects folds that ignore groups.
    given.clear()
    monkeypatch.setattr(cca, "folds_by_group", lambda groups, num_folds, seed: np.arange(len(groups)) % num_folds)
    calibrate_shares(sources, queries, truth, TOP_K, NUM_FOLDS)
    inside = {group_of[s] for s in given[0].tolist()}
    assert inside & {group_of[s] for s in set(group_of) - set(given[0].tolist())}


def test_fitted_shares_beat_the_default_on_held_out_pairs():
    found = calibrate_shares(*many_in_memory(), top_k=10)
    assert found.held_out.misplaced_share < found.default.misplaced_share / 2
    assert found.held_out.brier < found.default.brier
    assert found.held_out.expected_calibration_error < found.default.expected_calibration_error
    spread = [settings.inverse_temperature for settings in found.by_fold]
    assert min(spread) / 1.3 < found.fitted.inverse_temperature < max(spread) * 1.3


def test_copies_and_sources_of_other_roles_count_as_true():
    """Sources a and A (one group) and b (of another role) are true; c is not."""
    vectors = np.array([[1, 0, 0], [1, 0.01, 0], [0.9, 0.4, 0], [0, 0, 1.0]])
    sources = Collection(list("aAbc"), vectors, {"group": ["a", "a", "b", "c"]})
    rows = np.array([[1, 0.1, 0], [0.9, 0.1, 0.3], [0.1, 0, 1]])
    truth = [TruthRow("0", "content", "a"), TruthRow("1", "content", "c"), TruthRow("2", "content", "b")]
    truth += [TruthRow("0", "style", "b")]
    similarity, is_true, groups = pair_measures._candidates(
        sources, Collection(list("012"), rows), truth, 4, None, "group"
    )
    assert is_true[0].tolist() == [True, True, True, False] and groups.tolist() == ["a", "c", "b"]
    assert is_true[1].tolist() == [False, False, False, True] and is_true[2].sum() == 1
    assert similarity.shape == (3, 4)


def test_mappers_act_on_their_own_domain():
    sources, queries, truth = in_memory(1)
    rng = np.random.default_rng(5)
    real, synth = (LinearMapper(rng.standard_normal((7, 12)), rng.standard_normal(7)) for _ in range(2))
    mapped = replace(sources, vectors=real(sources.vectors)), replace(queries, vectors=synth(queries.vectors)), truth
    both = {"mappers": Mappers(real, synth)}
    assert pair_theory(sources, queries, truth, "content", **both) == pair_theory(*mapped, "content")
    assert calibrate_shares(sources, queries, truth, **both) == calibrate_shares(*mapped)


def test_the_error_says_why_pairs_cannot_be_measured():
    sources, queries, truth = in_memory()
    with pytest.raises(AttribError, match="no row of the role 'idea'; its roles are content, style"):
        pair_theory(sources, queries, truth, "idea")
    for measure in (
        lambda t: pair_theory(sources, queries, t, "content"),
        lambda t: calibrate_shares(sources, queries, t),
    ):
        with pytest.raises(AttribError, match="query 'absent' has no vector"):
            measure([*truth, TruthRow("absent", "content", truth[0].group)])
        with pytest.raises(AttribError, match="cannot be split into 5 folds"):
            measure(truth[:3])
    with pytest.raises(AttribError, match="shares_top_k"):
        validate(
            EvaluateSettings,
            {
                "methods": [{"name": "a", "sources": "s", "queries": "q"}],
                "truth": {"uri": "t.tsv", "key_column": "query"},
                "output": "o",
                "measures": {"shares_top_k": 1},
            },
            "here",
        )


def job_settings(settings: EvaluateSettings, name: str, **measures) -> EvaluateSettings:
    """The settings with another method name and other measures."""
    given = settings.model_dump(exclude={"abc"}) | {"measures": measures}
    given["methods"][0]["name"] = name
    return EvaluateSettings.model_validate(given)


def test_the_job_writes_the_numbers_and_the_figures(tmp_path, local):
    settings = job_settings(write_case(tmp_path, local, *drawn_case(0)), "a <b>method</b>", shares_top_k=TOP_K)
    printed, written = evaluate_by_job(settings)
    out = tmp_path / "out"
    sources, queries, truth = in_memory()
    sources, queries = (replace(c, vectors=c.vectors.astype(np.float16)) for c in (sources, queries))
    theory = pair_theory(sources, queries, truth, "content")
    shares = calibrate_shares(sources, queries, truth, TOP_K)
    assert written["theory"]["role"] == "content" and written["theory"]["not_measured"] == {}
    found = written["theory"]["methods"]["a <b>method</b>"]
    assert found["canonical_correlations"] == pytest.approx(theory.canonical_correlations, abs=1e-9)
    assert found["whiteness"] == pytest.approx(theory.whiteness)
    found = written["shares"]["methods"]["a <b>method</b>"]
    assert found["fitted"]["inverse_temperature"] == pytest.approx(shares.fitted.inverse_temperature, rel=1e-4)
    assert written["shares"]["default_shares"] == {"inverse_temperature": 50.0, "offset": -50.0}
    for name in ("default", "held_out"):
        for value in ("misplaced_share", "brier", "expected_calibration_error"):
            assert found[name][value] == pytest.approx(getattr(getattr(shares, name), value), abs=1e-4)
    assert len(found["by_fold"]) == NUM_FOLDS
    page = (out / "comparison.html").read_text()
    for name in ("theory", "shares"):
        svg = (out / f"{name}.svg").read_text()
        assert svg in page and ElementTree.fromstring(svg).tag.endswith("svg")
    headings = ["image made from it agree?</h2>", "hold 30 % of the truth?</h2>"]
    assert all(heading in page for heading in headings) and page.count('<p class="soft">Left: ') == 1
    assert "<b>method</b>" not in page and f"inverse_temperature {shares.fitted.inverse_temperature:.4g}" in page
    assert f"Brier {shares.default.brier:.3f}, {shares.held_out.brier:.3f}" in printed


def test_too_few_pairs_are_reported_and_do_not_stop_the_ranking(tmp_path, local):
    settings = write_case(tmp_path, local, *drawn_case(0)[:2], drawn_case(0)[2][:5])
    assert evaluate(settings, local)["one"].values["ap"].shape == (5,)
    found = measure_pairs(settings, local)
    assert found.theory == found.shares == found.plots == found.figures == {}
    assert "cannot be split into 5 folds" in found.numbers["theory"]["not_measured"]["one"]
    assert [line[:30] for line in found.lines()] == ["theory, one: not measured: 3 g", "shares, one: not measured: 3 g"]


def test_only_requested_measures_are_made_and_old_plots_are_deleted(tmp_path, local):
    settings = job_settings(write_case(tmp_path, local, *drawn_case(0)), "one", shares_top_k=None)
    found = measure_pairs(settings, local)
    assert found.theory.keys() == {"one"} and found.shares == {} and found.numbers.keys() == {"theory"}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "shares.svg").write_text("of an earlier evaluation")
    found.write_plots(settings.output, local)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theory.svg"]
    # AbC's protocol has no such pairs, so nothing is read.
    method = {"name": "a", "sources": "/gone/s", "queries": "/gone/q", "distractors": "/gone/d"}
    given = {"methods": [method], "abc": {"test_cases": {"c": "/gone/c.json"}}, "output": "/gone/out"}
    abc = EvaluateSettings.model_validate(given)
    assert measure_pairs(abc, local) == PairMeasures(abc.measures, {}, {}, {})
    assert measure_pairs(abc, local).numbers == {}


def test_the_reliability_plot_shows_the_bins_and_the_errors(monkeypatch):
    drawn_bins = {}

    def keep(bins, captions):
        drawn_bins.update(bins)
        return calibration_figure(bins, captions)

    monkeypatch.setattr(pair_measures, "calibration_figure", keep)
    similarity, is_true, _ = by_hand(*in_memory(), TOP_K)
    table = calibration.reliability(soft_shares(similarity, SharesSettings()), is_true)
    text = "".join(ElementTree.fromstring(reliability_plot({"default": table})).itertext())
    expected = f"default: error {table.expected_calibration_error:.4f}, misplaced {table.misplaced_share:.3f}, Brier"
    assert expected in text
    assert drawn_bins == {"default": [(b.mean_share, b.observed_share, b.count) for b in table.bins]}
    with pytest.raises(AttribError, match="no reliability"):
        reliability_plot({})
