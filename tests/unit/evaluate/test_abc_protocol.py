"""AbC's metrics against a direct computation that sorts each query's pool in float64, and memory at AbC's full size."""

import json
import subprocess
import sys

import numpy as np
import pytest
from support.pairs import unit, write_collection

from attrib.common.errors import AttribError
from attrib.evaluate import distractors as distractors_module
from attrib.evaluate.abc_protocol import RECALL_KS, CustomisedModel, parse_test_case, read_test_case, score_abc
from attrib.evaluate.collection import Collection
from attrib.evaluate.distractors import PREFIX, ArrayDistractors, listed_distractors, open_distractors, scan_distractors
from attrib.evaluate.mappers import LinearMapper, Mappers
from attrib.evaluate.protocol import evaluate
from attrib.evaluate.settings import EvaluateSettings

DIMENSION = 48


def ceilings(models: list[CustomisedModel], prompts: str) -> dict[int, float]:
    """The highest possible mean recall@k by k: k places have room for k exemplars."""
    weights = [len(model.synth[prompts]) for model in models]
    sizes = [len(model.exemplars) for model in models]
    return {k: float(np.average([min(k, size) / size for size in sizes], weights=weights)) for k in RECALL_KS}


def direct(queries, exemplars, distractors) -> list[tuple[float, float, float, float]]:
    """(AP, recall at 5, 10, 100) of each query, by sorting its whole pool; ties put distractors first."""
    pool = unit(np.concatenate([np.asarray(distractors, np.float64), np.asarray(exemplars, np.float64)]))
    is_exemplar = np.arange(len(pool)) >= len(distractors)
    found = []
    for query in unit(queries):
        order = np.argsort(-(pool @ query - 1e-12 * is_exemplar), kind="stable")  # distractors come first in the pool
        ranks = np.flatnonzero(is_exemplar[order]) + 1
        precision = sum((so_far + 1) / rank for so_far, rank in enumerate(ranks)) / len(ranks)
        found.append((precision, *(np.sum(ranks <= k) / len(ranks) for k in (5, 10, 100))))
    return found


class Case:
    """Random features of models with 1, 3 and 67 exemplars, with queries near the mean of the exemplars."""

    def __init__(self, seed: int, dtype=np.float16, num_distractors: int = 700):
        rng = np.random.default_rng(seed)
        self.sizes = {"one": 1, "three": 3, "many": 67}
        self.vectors = {name: rng.standard_normal((n, DIMENSION)).astype(dtype) for name, n in self.sizes.items()}
        self.queries = {
            (name, prompts): (v.mean(0) + rng.normal(0, {1: 1.8, 3: 1.2}.get(len(v), 0.2), (6, DIMENSION))).astype(
                dtype
            )
            for name, v in self.vectors.items()
            for prompts in ("gpt", "object")
        }
        self.distractors = rng.standard_normal((num_distractors, DIMENSION)).astype(dtype)

    def models(self) -> list[CustomisedModel]:
        return [
            CustomisedModel(
                name,
                [f"{name}/{i}.jpg" for i in range(size)],
                {prompts: [f"{name}/{prompts}/{i}.png" for i in range(6)] for prompts in ("gpt", "object")},
            )
            for name, size in self.sizes.items()
        ]

    def collections(self) -> tuple[Collection, Collection]:
        sources = [f"{name}/{i}.jpg" for name, size in self.sizes.items() for i in range(size)]
        queries = [f"{name}/{prompts}/{i}.png" for name, prompts in self.queries for i in range(6)]
        return (
            Collection(sources, np.concatenate(list(self.vectors.values()))),
            Collection(queries, np.concatenate(list(self.queries.values()))),
        )

    def score(self, **options):
        return score_abc({"case": self.models()}, *self.collections(), ArrayDistractors(self.distractors), **options)

    def compare(self, scores, map_real=lambda x: x, map_synth=lambda x: x, prefix="", others=lambda name: []):
        """Every value of every query against the direct computation."""
        at = 0
        names = [f"{prefix}{value}" for value in ("ap", "recall_at_5", "recall_at_10", "recall_at_100")]
        for prompts in ("gpt", "object"):
            for name, vectors in self.vectors.items():
                pool = np.concatenate([self.distractors, *others(name)])
                expected = direct(map_synth(self.queries[name, prompts]), map_real(vectors), map_real(pool))
                rows = slice(at, at + 6)
                assert scores.cells[rows] == [("case", prompts)] * 6 and scores.units[rows] == [name] * 6
                found = np.stack([scores.values[value][rows] for value in names], axis=1)
                assert np.allclose(found, expected, atol=1e-6, rtol=0)
                at += 6
        assert at == len(scores.queries)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_values_equal_a_direct_computation(dtype, monkeypatch):
    monkeypatch.setattr(distractors_module, "BLOCK_ROWS", 150)  # several blocks, the last shorter
    case = Case(0, dtype)
    scores = case.score()
    case.compare(scores)
    assert 0.01 < scores.values["ap"].mean() < 0.9 and len(set(scores.values["ap"])) > 20


def test_real_and_synthetic_images_pass_through_their_own_mapper():
    rng = np.random.default_rng(3)
    layers = {
        name: LinearMapper(
            np.eye(DIMENSION) + 0.2 * rng.standard_normal((DIMENSION, DIMENSION)), rng.standard_normal(DIMENSION)
        )
        for name in ("real", "synth")
    }
    case = Case(1)
    scores = case.score(mappers=Mappers(**layers), whole_pool=True)
    case.compare(scores, layers["real"], layers["synth"])
    assert not np.allclose(scores.values["ap"], case.score().values["ap"])


def test_the_whole_pool_holds_the_exemplars_of_all_models():
    case = Case(2)
    scores = case.score(whole_pool=True)
    case.compare(scores)
    case.compare(
        scores, prefix="whole_pool_", others=lambda name: [v for other, v in case.vectors.items() if other != name]
    )
    assert (scores.values["whole_pool_ap"] <= scores.values["ap"]).all()
    assert (scores.values["whole_pool_ap"] < scores.values["ap"]).any()


def test_near_ties_in_float32_are_ranked_as_in_float64():
    """Distractors within 1e-8 of an exemplar count if they are more similar; copies of the exemplar rank before it."""
    case = Case(4, np.float64)
    exemplar, query = unit(case.vectors["one"])[0], unit(case.queries["one", "gpt"])[0]
    across = query - (query @ exemplar) * exemplar
    steps = np.linspace(-1e-8, 1e-8, 40)  # an even number: none is 0
    near = exemplar + steps[:, None] * across / np.linalg.norm(across)
    copies = np.repeat(case.vectors["one"], 3, axis=0) * np.array([[1.0], [0.5], [3.0]])
    alone = case.score().values["ap"][0]
    case.distractors = np.concatenate([case.distractors, near, copies])
    scores = case.score()
    case.compare(scores)
    assert np.unique(np.float32(near @ query)).size < 4  # float32 cannot order them
    assert 1 / scores.values["ap"][0] == pytest.approx(1 / alone + 20 + 3)


@pytest.mark.parametrize("seed", range(4))
def test_counts_and_best_distractors_equal_those_of_the_full_matrix(seed, monkeypatch):
    monkeypatch.setattr(distractors_module, "BLOCK_ROWS", 64)
    rng = np.random.default_rng(seed)
    queries, distractors = unit(rng.standard_normal((30, 100))), rng.standard_normal((int(rng.integers(3, 300)), 100))
    distractors[rng.integers(0, len(distractors), 20)] = distractors[0]
    # The best distractors of half of the queries are within 1e-7 of each other, too close for float32.
    near = rng.integers(0, len(distractors), 60)
    distractors[near] = distractors[0] + 1e-6 * rng.standard_normal((60, 100))
    queries[::2] = unit(distractors[0] + 3 * rng.standard_normal((15, 100)))
    similarity = queries @ unit(distractors).T
    thresholds = np.where(rng.random((30, 4)) < 0.5, rng.choice(similarity[0], (30, 4)), rng.uniform(-1, 1, (30, 4)))
    thresholds[:, 0] = similarity[np.arange(30), rng.integers(0, len(distractors), 30)]  # exact ties
    thresholds[::3, 2:] = np.inf  # padding
    thresholds[::4] = 2.0  # unreachable, so only the best distractors decide which pairs are examined
    scan = scan_distractors(queries, thresholds, ArrayDistractors(distractors))
    assert np.array_equal(scan.num_at_or_above, (similarity[:, None] >= thresholds[:, :, None] - 1e-12).sum(axis=2))
    best = -np.sort(-similarity, axis=1)[:, :5]
    assert np.allclose(scan.top_similarity[:, : best.shape[1]], best, rtol=0, atol=1e-12)
    assert (scan.top_rows[:, best.shape[1] :] == -1).all()
    for query, rows, found in zip(queries, scan.top_rows, scan.top_similarity):
        rows = rows[rows >= 0]
        assert len(set(rows)) == len(rows) and np.allclose(unit(distractors)[rows] @ query, found[: len(rows)])


def test_the_most_similar_and_the_true_sources_are_returned():
    case = Case(5)
    scores = case.score()
    pool = {f"{PREFIX}row {i}": v for i, v in enumerate(case.distractors)}
    for row, (query, name) in enumerate(zip(scores.queries, scores.units)):
        own = {f"{name}/{i}.jpg": v for i, v in enumerate(case.vectors[name])}
        asked = unit(case.queries[name, scores.cells[row][1]])[int(query.split("/")[-1][:-4])]
        expected = sorted((float(unit([v])[0] @ asked) for v in (pool | own).values()), reverse=True)[:5]
        assert np.allclose(scores.top_similarity[row], expected) and scores.true_keys[row] == list(own)
        for key, similarity in zip(scores.top_keys[row], scores.top_similarity[row]):
            assert unit([(pool | own)[key]])[0] @ asked == pytest.approx(similarity)


def test_distractors_of_all_three_kinds_give_equal_scores(tmp_path, local):
    case = Case(6)
    sources, queries = case.collections()
    keys = [f"laion/{i}.jpg" for i in range(len(case.distractors))]
    places = {
        "sources": write_collection(tmp_path, "sources", sources.keys, sources.vectors, local),
        "queries": write_collection(tmp_path, "queries", queries.keys, queries.vectors, local),
    }
    both = Collection(sources.keys + keys, np.concatenate([sources.vectors, case.distractors]))
    all_sources = write_collection(tmp_path, "all", both.keys, both.vectors, local)
    embedded = write_collection(tmp_path, "distractors", keys, case.distractors, local)
    np.save(tmp_path / "features.npy", case.distractors)
    (tmp_path / "list.txt").write_text("".join(f"x/{key}\n" for key in keys))
    entries = [
        {"exemplar": [f"x/{key}" for key in m.exemplars], "class_id": m.name,
         "synth": {prompts: [f"y/{key}" for key in found] for prompts, found in m.synth.items()}}
        for m in case.models()
    ]  # fmt: skip
    (tmp_path / "case.json").write_text(json.dumps(entries))
    abc = {"test_cases": {"case": tmp_path / "case.json"}, "exemplar_prefix": "x/", "query_prefix": "y/"}
    methods = [
        {"name": "embedded", **places, "distractors": embedded},
        {"name": "npy", **places, "distractors": str(tmp_path / "features.npy")},
    ]
    given = {"methods": methods, "abc": json.loads(json.dumps(abc, default=str)), "output": str(tmp_path / "out")}
    results = evaluate(EvaluateSettings.model_validate(given), local)
    listed = given | {
        "methods": [{"name": "listed", **places, "sources": all_sources}],
        "abc": given["abc"] | {"distractors": str(tmp_path / "list.txt")},
    }
    results |= evaluate(EvaluateSettings.model_validate(listed), local)
    expected = case.score()
    for name, scores in results.items():
        assert scores.asked() == expected.asked()
        assert all(np.array_equal(scores.values[value], expected.values[value]) for value in expected.values), name
    named = {name: [key for keys in scores.top_keys for key in keys] for name, scores in results.items()}
    assert {key.removeprefix(PREFIX) for key in named["embedded"]} == set(named["listed"])
    assert sum(PREFIX + "row " in key for key in named["npy"]) == sum("laion" in key for key in named["listed"]) > 0


def test_ceilings_of_the_released_test_cases(data_folder, local):
    """recall@5 can reach 0.630 on Artchive and 0.784 on BAM-FG; sizes as in the paper's files."""
    expected = {"artchive": (255, 3081, 0.630), "bamfg": (250, 1692, 0.784)}
    for name, (num_models, num_exemplars, at_5) in expected.items():
        path = data_folder / "abc" / f"test_{name}.json"
        if not path.exists():
            pytest.skip(f"AbC's released test case is not at {path}")
        models = read_test_case(str(path), local, "dataset/exemplar/", "dataset/synth/")
        assert len(models) == num_models == len({model.name for model in models})
        assert sum(len(model.exemplars) for model in models) == num_exemplars
        assert not any(key.startswith("dataset/") for model in models for key in model.exemplars + model.synth["gpt"])
        assert all(m.synth.keys() == {"gpt", "object"} and {len(p) for p in m.synth.values()} == {40} for m in models)
        found = ceilings(models, "gpt")
        assert found == ceilings(models, "object") and round(found[5], 3) == at_5
        assert found[5] < found[10] < found[100] == 1.0


def test_ceilings_of_scores_are_those_of_the_test_case():
    case = Case(7)
    scores, expected = case.score(), ceilings(case.models(), "gpt")
    for k in (5, 10, 100):
        rows = [i for i, cell in enumerate(scores.cells) if cell[1] == "gpt"]
        assert scores.ceilings[f"recall_at_{k}"][rows].mean() == pytest.approx(expected[k])
        assert (scores.values[f"recall_at_{k}"] <= scores.ceilings[f"recall_at_{k}"] + 1e-12).all()
    assert expected[5] == pytest.approx((1 + 1 + 5 / 67) / 3)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({}, "a test case is a list"),
        ([], "a test case is a list"),
        ([{"exemplar": ["a"]}], "entry 0 is not of the form"),
        ([{"exemplar": [], "synth": {}}], "entry 0 has no exemplar"),
        ([{"exemplar": "a.jpg", "synth": {}}], "entry 0, exemplar is not a list of paths"),
        ([{"exemplar": ["a"], "synth": {"gpt": [1]}}], "entry 0, synth 'gpt' is not a list of paths"),
        ([{"exemplar": ["a", "b", "a"], "synth": {}}], "entry 0, exemplar lists 'a' twice"),
    ],
)
def test_the_error_names_the_invalid_entry_of_a_test_case(entries, expected):
    with pytest.raises(AttribError, match=f"^here: {expected}|^here.*{expected}"):
        parse_test_case(entries, "here")


def test_the_error_names_an_image_that_cannot_be_scored(tmp_path, local):
    case = Case(8)
    sources, queries = case.collections()
    fewer = Collection(sources.keys[1:], sources.vectors[1:])
    apart = ArrayDistractors(case.distractors)
    with pytest.raises(AttribError, match=r"exemplar 'one/0.jpg' \(1 of 71\) has no vector .* abc.exemplar_prefix"):
        score_abc({"case": case.models()}, fewer, queries, apart)
    fewer = Collection(queries.keys[:-2], queries.vectors[:-2])
    with pytest.raises(AttribError, match=r"synthetic image 'many/object/4.png' \(2 of 36\) has no vector"):
        score_abc({"case": case.models()}, sources, fewer, apart)
    with pytest.raises(
        AttribError, match=r"'one/0.jpg' is an exemplar of test case 'case'; it would compete with itself"
    ):
        score_abc({"case": case.models()}, sources, queries, ArrayDistractors(sources.vectors, sources.keys))
    with pytest.raises(AttribError, match="vectors of 7 numbers and the queries have 48"):
        score_abc({"case": case.models()}, sources, queries, ArrayDistractors(case.distractors[:, :7]))
    case.distractors[300, 4] = np.inf
    with pytest.raises(AttribError, match="row 300 holds a NaN or infinity"):
        score_abc({"case": case.models()}, sources, queries, apart)
    (tmp_path / "list.txt").write_text("one/0.jpg\nnope.jpg\n")
    with pytest.raises(AttribError, match=r"'nope.jpg' \(1 of 2\) has no vector"):
        listed_distractors(str(tmp_path / "list.txt"), "", sources, local)
    (tmp_path / "list.txt").write_text("one/0.jpg\none/0.jpg\n")
    with pytest.raises(AttribError, match=r"lists 'one/0.jpg' twice"):
        listed_distractors(str(tmp_path / "list.txt"), "", sources, local)
    with pytest.raises(AttribError, match="no synthetic image"):
        score_abc({"case": [CustomisedModel("m", ["one/0.jpg"], {})]}, sources, queries, apart)


def test_an_npy_without_a_float_matrix_is_an_error(tmp_path, local):
    np.save(tmp_path / "objects.npy", np.array([print, "x"], dtype=object), allow_pickle=True)
    np.save(tmp_path / "integers.npy", np.zeros((3, 4), np.int64))
    (tmp_path / "text.npy").write_text("no array")
    for name, expected in (
        ("objects", "not a .npy file of numbers"),
        ("text", "not a .npy file"),
        ("integers", "give a float matrix"),
    ):
        with pytest.raises(AttribError, match=expected), open_distractors(str(tmp_path / f"{name}.npy"), local):
            pass


FULL_SIZE = """
import json, resource, sys, time
import numpy as np
from attrib.evaluate.abc_protocol import CustomisedModel, score_abc
from attrib.evaluate.collection import Collection, unit_rows
from attrib.evaluate.distractors import ArrayDistractors
path, rng = sys.argv[1], np.random.default_rng(0)
distractors = np.lib.format.open_memmap(path, "w+", np.float16, (1_000_000, 768))
for start in range(0, len(distractors), 50_000):
    distractors[start : start + 50_000] = rng.standard_normal((50_000, 768), np.float32)
distractors.flush()
del distractors
exemplars = rng.standard_normal((3_000, 768)).astype(np.float16)  # 250 models of 12
means = np.repeat(exemplars.reshape(250, 12, 768).mean(1), 40, axis=0)
queries = (means + rng.normal(0, 0.9, (10_000, 768))).astype(np.float16)
models = [
    CustomisedModel(
        f"m{m}",
        [f"e{i}" for i in range(12 * m, 12 * m + 12)],
        {"gpt": [f"q{i}" for i in range(40 * m, 40 * m + 40)]},
    )
    for m in range(250)
]
sources = Collection([f"e{i}" for i in range(3_000)], exemplars)
asked = Collection([f"q{i}" for i in range(10_000)], queries)
before = time.monotonic()
vectors = np.load(path, mmap_mode="r")
scores = score_abc({"full": models}, sources, asked, ArrayDistractors(vectors), whole_pool=True)
seconds, peak = time.monotonic() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
checked = []
for q in range(0, 10_000, 2_500):
    query = unit_rows(queries[[q]])[0]
    found = np.concatenate([unit_rows(vectors[s : s + 50_000]) @ query for s in range(0, 1_000_000, 50_000)])
    own = np.sort(unit_rows(exemplars[q // 40 * 12 : q // 40 * 12 + 12]) @ query)[::-1]
    ranks = [1 + j + int((found >= s).sum()) for j, s in enumerate(own)]
    checked.append((scores.values["ap"][q], float(np.mean([(j + 1) / r for j, r in enumerate(ranks)]))))
measured = {"seconds": seconds, "peak_gb": peak * 1024 / 1e9, "map": scores.values["ap"].mean(), "checked": checked}
print(json.dumps(measured))
"""


def test_scoring_at_the_full_size_of_abc_fits_24_gb(request, tmp_path):
    """A million distractors of 768 numbers and 10,000 queries: 15 TFLOP, some minutes on two cores."""
    if not request.config.getoption("--long"):
        pytest.skip("takes some minutes and 1.5 GB of disk; run with --long")
    path = tmp_path / "features.npy"
    ended = subprocess.run([sys.executable, "-c", FULL_SIZE, str(path)], capture_output=True, text=True, timeout=3600)
    path.unlink(missing_ok=True)
    assert ended.returncode == 0, ended.stderr
    print(ended.stdout)
    measured = json.loads(ended.stdout)
    assert measured["peak_gb"] < 24 and 0.001 < measured["map"] < 0.99
    for found, expected in measured["checked"]:
        assert found == pytest.approx(expected, abs=1e-6)
