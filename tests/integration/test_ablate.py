"""The ablate job from images to the page: its outputs, and later runs that reuse work and add variants."""

import contextlib
import csv
import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image, ImageOps
from support.cluster import drawn_image
from support.files import LOCAL
from support.hostile import encode
from support.images import write_folder
from support.pairs import Page

from attrib.evaluate.ablation.settings import CHOSEN
from attrib.evaluate.collection import Collection
from attrib.evaluate.protocol import TruthRow, score_truth
from attrib.models.encoder import load_network
from attrib.models.settings import BackboneSettings
from jobs import ablate as job

NUM_SOURCES, NUM_QUERIES, NUM_FOLDS = 30, 32, 3
RESAMPLING = Image.Resampling.BICUBIC  # timm's for this network
NETWORK = {"name": "test_resnet", "weights": "random"}
PARTS = {
    "content": {"blocks": ["pooled"], "role": "content"},
    "style": {"blocks": ["moments"], "role": "style"},
}
OPTIMISER = {"num_epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "validation_share": 0.3}
VIEWS = {"learns_from": "views", "features": "both", "head": {"net": "linear", "num_directions": 12, "parts": PARTS}}
WHITENED = {"projection": "whiten", "shrinkage": 0.1, "net": "none"}
VARIANTS = [
    {"name": "raw", "head": {"projection": "identity", "net": "none"}},
    {"name": "ZCA 0.1", "head": WHITENED},
    {"name": "ZCA 0.1, by domain", "learns_from": "queries", "head": WHITENED | {"separate_domains": True}},
    {
        "name": "supervised",
        "learns_from": "pairs",
        "head": {"projection": "identity", "net": "linear", "separate_domains": True},
        "optimiser": OPTIMISER,
    },
    VIEWS | {"name": "views", "optimiser": OPTIMISER, "disentanglement": {"kind": "gaussian_infomax"}},
    VIEWS | {"name": "views: solo", "optimiser": OPTIMISER, "kinds": ["solo"]},
]
NAMES = [variant["name"] for variant in VARIANTS]
ONE_MORE = {"name": "centred", "head": {"projection": "centre", "net": "none"}}
DIMENSIONS = [96, 29, 96, 96, 24, 24]
LENGTHS = [1, 1, 1, 1, 2, 2]  # squared: each part has length one


class Site:
    """Drawn sources, two of them copies, images made from them, the tables, and a finished run."""

    def __init__(self, folder: Path):
        self.folder = folder
        sources = {f"{i:02}.png": drawn_image(i) for i in range(NUM_SOURCES - 2)}
        sources |= {f"copy-{i}.png": sources[f"{i:02}.png"] for i in range(2)}
        queries, truth = {}, []
        for i in range(NUM_QUERIES):
            content, style = i % (NUM_SOURCES - 2), (5 * i + 3) % (NUM_SOURCES - 2)
            queries[f"{'mirror' if i % 2 else 'post'}/{i:02}.png"] = self._made(sources, content, style, i)
            key = f"queries/{list(queries)[-1]}"
            truth += [(key, "content", f"g{content}"), *([(key, "style", f"g{style}")] if i % 3 else [])]
        write_folder(sources, str(folder / "sources"), LOCAL)
        write_folder(queries, str(folder / "queries"), LOCAL)
        groups = [(f"sources/{key}", f"g{int(key.removeprefix('copy-')[:-4])}") for key in sources]
        self._write_table("sources", ("file", "group"), groups)
        self._write_table("queries", ("file", "method"), [(f"queries/{key}", "drawn") for key in queries])
        self._write_table("truth", ("query", "role", "source_group"), truth)
        self.groups = dict(groups)
        self.truth = [TruthRow(query, role, group) for query, role, group in truth]
        self.output = folder / "out"
        self.stdout, self.stderr = self.run()

    @staticmethod
    def _made(sources: dict[str, bytes], content: int, style: int, seed: int) -> bytes:
        """A content image blended with a style image, then mirrored or posterised."""
        first, second = (Image.open(io.BytesIO(sources[f"{i:02}.png"])).convert("RGB") for i in (content, style))
        mixed = Image.blend(first, second.resize(first.size), 0.3)
        return encode(ImageOps.mirror(mixed) if seed % 2 else ImageOps.posterize(mixed, 3), "PNG")

    def _write_table(self, name: str, titles: tuple[str, ...], rows: list[tuple]) -> None:
        with open(self.folder / f"{name}.tsv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter="\t").writerows([titles, *rows])

    def values(self, variants: list[dict] = VARIANTS, **changes) -> dict:
        def collection(name: str, folder: str) -> dict:
            table = {"uri": str(self.folder / f"{folder}.tsv"), "key_column": "file", "key_prefix": f"{folder}/"}
            return {"name": name, "uri": str(self.folder / folder), "metadata": table}

        return {
            "sources": collection("drawn-sources", "sources"),
            "generated": collection("drawn-queries", "queries"),
            "truth": {"uri": str(self.folder / "truth.tsv"), "key_column": "query", "key_prefix": "queries/"},
            "output": str(self.folder / "out"),
            "backbone": NETWORK,
            "feature_sets": {"whole": {"whole_image": True}, "both": {"moment_levels": [1], "whole_image": True}},
            "view_sets": {"standard": {"mix": {"texture": 0, "colour": 1, "bands": 0, "solo": 1}}},
            "views_per_image": 4,
            "variants": variants,
            "num_folds": NUM_FOLDS,
            "reference": "ZCA 0.1",
            "theory": ["raw", "views"],
        } | changes

    def run(self, *variants: list[dict], **changes) -> tuple[str, str]:
        """Run jobs.ablate in this process, on the tests' Ray; returns its stdout and stderr."""
        config = self.folder / "ablate.yaml"
        config.write_text(yaml.safe_dump(self.values(*variants, **changes)), encoding="utf-8")
        out, err = io.StringIO(), io.StringIO()
        self.last_stderr = err
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.setattr(sys, "argv", ["ablate", "--config", str(config)])
            job.main()
        return out.getvalue(), err.getvalue()

    def copied(self, name: str) -> Path:
        """A copy of the finished output, for a run that adds to it."""
        return Path(shutil.copytree(self.output, self.folder / name))

    @staticmethod
    def times(output: Path) -> dict[str, int]:
        """Modification times of the files that are kept for the next run."""
        kept = (path for name in ("_variants", "_features") for path in (output / name).rglob("*"))
        return {str(path.relative_to(output)): path.stat().st_mtime_ns for path in kept if path.is_file()}

    def vectors(self, name: str, output: str = "out") -> dict[str, np.ndarray]:
        safe = "".join(c if c.isalnum() else "_" for c in name)
        with np.load(self.folder / output / "vectors" / f"{safe}.npz", allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}


@pytest.fixture(scope="module")
def site(tmp_path_factory, local_ray) -> Site:
    return Site(tmp_path_factory.mktemp("ablate"))


def test_the_table_holds_every_variant_and_the_choice_by_folds(site):
    table = (site.output / "table.txt").read_text()
    assert site.stdout == f"{table.rstrip()}\npage: {site.output}/comparison.html\n"
    summary = json.loads(
        (site.output / "evaluation.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON")
    )
    assert list(summary["methods"]) == [*NAMES, CHOSEN] and summary["reference"] == "ZCA 0.1"
    assert [(cell["role"], cell["num_rows"], cell["in_macro"]) for cell in summary["cells"]] == [
        ("content", NUM_QUERIES, True),
        ("style", 21, False),
    ]
    for name in summary["methods"]:
        assert (
            f"\n{name:{max(map(len, summary['methods']))}} {summary['methods'][name]['macro']['ap']['mean']:.4f} ("
            in table
        )
    for name in NAMES:
        assert f"ablate: {name}: macro mAP {summary['methods'][name]['macro']['ap']['mean']:.4f} (" in site.stderr
    record = json.loads((site.output / "ablation.json").read_text())
    assert len(record[CHOSEN]) == NUM_FOLDS and set(record[CHOSEN]) <= {"views", "views: solo"}
    assert [made["dimension"] for made in record["variants"].values()] == DIMENSIONS
    epochs = {name: [row["epoch"] for row in made["history"]] for name, made in record["variants"].items()}
    trained = {"supervised", "views", "views: solo"}
    assert epochs == {name: [-1, 0, 1] if name in trained else [] for name in NAMES}
    assert record["settings"]["num_folds"] == NUM_FOLDS and {"torch", "ray"} <= set(record["versions"])
    assert set(record["theory"]) == {"raw", "views"}
    rows = pq.read_table(site.output / "queries.parquet").to_pylist()
    assert len(rows) == len(site.truth) * (len(NAMES) + 1)


def test_the_page_shows_the_variants_and_the_theory(site):
    raw = (site.output / "comparison.html").read_text(encoding="utf-8")
    page = Page(raw)
    assert all(name in page.text for name in (*NAMES, CHOSEN, "Variants compared", "Theory:"))
    assert (site.output / "theory.svg").read_text() in raw
    assert "script" not in dict(page.elements)
    assert not re.search("https?://", re.sub(r'xmlns(:xlink)?="[^"]*"', "", raw))


@pytest.mark.parametrize("name", NAMES)
def test_vectors_have_the_order_of_their_files_and_reproduce_the_scores(name, site):
    found, at = site.vectors(name), NAMES.index(name)
    assert {key: value.shape for key, value in found.items()} == {
        "source_files": (NUM_SOURCES,),
        "sources": (NUM_SOURCES, DIMENSIONS[at]),
        "query_files": (NUM_QUERIES,),
        "queries": (NUM_QUERIES, DIMENSIONS[at]),
    }
    assert set(found["source_files"].tolist()) == set(site.groups)
    assert set(found["query_files"].tolist()) == {row.query for row in site.truth}
    for vectors in (found["sources"], found["queries"]):
        assert vectors.dtype == np.float32
        np.testing.assert_allclose((vectors.astype(np.float64) ** 2).sum(axis=1), LENGTHS[at], atol=1e-5)
    if name in ("ZCA 0.1, by domain", "supervised"):
        return  # each fold has its own vectors; these are of the first
    files = found["source_files"].tolist()
    scores = score_truth(
        Collection(files, found["sources"], {"group": [site.groups[file] for file in files]}),
        Collection(found["query_files"].tolist(), found["queries"], {"method": ["drawn"] * NUM_QUERIES}),
        site.truth,
    )
    rows = pq.read_table(site.output / "queries.parquet").to_pylist()
    rows = [row for row in rows if row["evaluated_method"] == name]
    assert [f"queries/{row['query']}" for row in rows] == scores.queries
    assert [row["ap"] for row in rows] == scores.values["ap"].tolist()


def test_raw_vectors_are_those_of_the_network(site):
    """Decoded by Pillow here; each vector must be that of its own file."""
    network, found = load_network(BackboneSettings(**NETWORK), LOCAL), site.vectors("raw")
    side = network.data_config["input_size"][-1]
    mean, std = (torch.tensor(network.data_config[name])[:, None, None] for name in ("mean", "std"))
    files = [*found["source_files"].tolist(), *found["query_files"].tolist()]
    squashed = [Image.open(site.folder / file).convert("RGB").resize((side, side), RESAMPLING) for file in files]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in squashed])
    with torch.no_grad():
        expected = torch.nn.functional.normalize(network.model.eval()((pixels - mean) / std), dim=1).numpy()
    vectors = np.concatenate([found["sources"], found["queries"]])
    error = np.abs(vectors - expected).max()
    distances = np.abs(expected[:, None] - expected).max(axis=2)
    assert error < np.quantile(distances[distances > 0], 0.05) / 2, (error, np.quantile(distances, [0.05, 0.5]))


def test_a_second_run_repeats_no_work(site):
    before, table = site.times(site.output), (site.output / "table.txt").read_text()
    assert len([name for name in before if name.endswith("outcome.json")]) == len(NAMES)
    stdout, stderr = site.run()
    assert site.times(site.output) == before and stdout == site.stdout
    assert (site.output / "table.txt").read_text() == table
    assert f"ablate: {NAMES[-1]}: macro mAP" in stderr and "finished before, at" in stderr


def test_a_larger_run_adds_variants_and_finishes_unfinished_ones(site):
    """In a copy of the output, with one more variant and one finished variant whose record is deleted."""
    larger = site.copied("larger")
    (torn,) = (larger / "_variants").glob("ZCA_0_1-*")
    (torn / "outcome.json").unlink()
    before = site.times(larger)
    stdout, stderr = site.run([ONE_MORE, *VARIANTS], output=str(larger))
    after = site.times(larger)
    assert stderr.count("macro mAP") == len(VARIANTS) + 1
    added = {name for name in after if name not in before}
    (new,) = {Path(name).parts[1] for name in added} - {torn.name}
    assert new.startswith("centred-") and {name.split("/")[0] for name in added} == {"_variants"}
    assert added == {f"_variants/{folder}/outcome.json" for folder in (new, torn.name)} | {
        f"_variants/{new}/outcome.npz"
    }
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {f"_variants/{torn.name}/outcome.npz"}
    # The repeated variant and all old means are unchanged.
    for name in NAMES:
        old, new = site.vectors(name), site.vectors(name, "larger")
        assert all(np.array_equal(old[key], new[key]) for key in old)
    old, new = (json.loads((folder / "evaluation.json").read_text())["methods"] for folder in (site.output, larger))
    assert list(new) == ["centred", *NAMES, CHOSEN]
    assert all(new[name]["macro"] == method["macro"] for name, method in old.items())
    assert "\ncentred " in stdout and (larger / "vectors" / "centred.npz").exists()


def test_changed_options_make_another_variant(site):
    """A variant of the same name with other options: only the work that depends on them is repeated."""
    other = site.copied("other")
    before = site.times(other)
    variants = [v | {"head": v["head"] | {"shrinkage": 0.3}} if v["name"] == "ZCA 0.1" else v for v in VARIANTS]
    site.run(variants, output=str(other))
    after = site.times(other)
    added = {Path(name).parent.name for name in after if name not in before}
    assert len(added) == 1 and next(iter(added)).startswith("ZCA_0_1-")
    assert {name: after[name] for name in before} == before
    old, new = (site.vectors("ZCA 0.1", folder)["queries"] for folder in ("out", "other"))
    assert old.shape == new.shape and np.abs(old - new).max() > 1e-3


def test_an_edited_truth_table_is_scored_again(site):
    """In the same output: all scores are repeated, and features, which do not depend on the table, are kept."""
    output, path = site.copied("edited"), site.folder / "truth.tsv"
    variants, plain = VARIANTS[:2], {"reference": None, "theory": []}
    old, before = path.read_text(encoding="utf-8"), site.times(output)
    recorded = json.loads((output / "ablation.json").read_text())["inputs"]
    title, *rows = old.splitlines()
    moved = [re.sub(r"\tg(\d+)$", lambda m: f"\tg{(int(m[1]) + 1) % (NUM_SOURCES - 2)}", row) for row in rows]
    try:
        path.write_text("\n".join([title, *moved]) + "\n", encoding="utf-8")
        site.run(variants, output=str(output), **plain)
        after = site.times(output)
        edited = json.loads((output / "ablation.json").read_text())["inputs"]
        means = json.loads((output / "evaluation.json").read_text())["methods"]
        rescored = pq.read_table(output / "queries.parquet").to_pylist()
    finally:
        path.write_text(old, encoding="utf-8")
    added = {name for name in after if name not in before}
    assert {name.split("/")[0] for name in added} == {"_variants"}
    assert sorted({Path(name).parts[1].rsplit("-", 1)[0] for name in added}) == ["ZCA_0_1", "raw"]
    assert {name: after[name] for name in before} == before
    assert {name for name in edited if edited[name] != recorded[name]} == {"truth"}
    assert {f"queries/{row['query']}\t{row['role']}\t{row['unit']}" for row in rescored} == set(moved)
    first = json.loads((site.output / "evaluation.json").read_text())["methods"]
    assert all(means[v["name"]]["macro"]["ap"] != first[v["name"]]["macro"]["ap"] for v in variants)
    # The restored table needs no new scores.
    site.run(variants, output=str(output), **plain)
    assert site.times(output) == after


def test_an_error_is_reported_in_one_line(site):
    output = str(site.folder / "refused")
    with pytest.raises(SystemExit) as ended:
        site.run([VARIANTS[0], VARIANTS[0]], output=output, reference=None, theory=[])
    assert ended.value.code == 2 and not Path(output).exists()
    with open(site.folder / "truth.tsv", encoding="utf-8") as file:
        (site.folder / "stray.tsv").write_text(f"{file.read()}queries/gone.png\tcontent\tg1\n", encoding="utf-8")
    table = {"uri": str(site.folder / "stray.tsv"), "key_column": "query", "key_prefix": "queries/"}
    shutil.copytree(site.output, output)
    with pytest.raises(SystemExit) as ended:
        site.run(VARIANTS[:1], output=output, truth=table, reference=None, theory=[])
    assert ended.value.code == 1 and "query 'gone.png' has no vector" in site.last_stderr.getvalue()


def test_end_to_end_variants_are_trained_and_scored_beside_the_others(site, request, monkeypatch):
    if not request.config.getoption("--long"):
        pytest.skip("takes a minute under Ray Train; run with --long")
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")  # an epoch here is shorter than the default
    tuned = site.copied("tuned")
    before = site.times(tuned)
    variant = VIEWS | {"name": "end to end", "fine_tune": {"num_blocks": 1, "learning_rate": 1e-3}}
    variant |= {"optimiser": OPTIMISER | {"num_epochs": 1}}
    site.run([*VARIANTS, variant], output=str(tuned))
    found = site.vectors("end to end", "tuned")
    assert found["sources"].shape == (NUM_SOURCES, 24) and found["queries"].shape == (NUM_QUERIES, 24)
    assert found["source_files"].tolist() == site.vectors("raw")["source_files"].tolist()
    # Copies have equal vectors, so rows must belong to their own files.
    row = {file: i for i, file in enumerate(found["source_files"].tolist())}
    similarity = found["sources"] @ found["sources"].T / 2
    for i in range(2):
        copies = [row[f"sources/{i:02}.png"], row[f"sources/copy-{i}.png"]]
        assert similarity[copies[0], copies[1]] > 0.999
    record = json.loads((tuned / "ablation.json").read_text())
    assert [entry["epoch"] for entry in record["variants"]["end to end"]["history"]] == [-1, 0]
    scores = json.loads((tuned / "evaluation.json").read_text())["methods"]
    assert list(scores) == [*NAMES, "end to end", CHOSEN]
    assert "img" in Page((tuned / "comparison.html").read_text(encoding="utf-8")).tags
    assert {name: time for name, time in site.times(tuned).items() if name in before} == before
    after = site.times(tuned)
    site.run([*VARIANTS, variant], output=str(tuned))
    assert site.times(tuned) == after
