"""The registry: refused entries, versions, references under each degradation, self-similarity and families."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from support.generators import STORAGE, Vectors, around, drawn_samples, spectrum_method, unit

from attrib.common.errors import AttribError, MismatchError
from attrib.generators.evaluation.controls import CodecAndSize
from attrib.generators.fingerprints.base import SCORINGS
from attrib.generators.fingerprints.scoring import mean_cosine
from attrib.generators.registry.galleries import Galleries, compare, families
from attrib.generators.registry.registration import as_sources, describe
from attrib.generators.registry.registry import embed_degraded, new_registry, open_registry, register, remove
from attrib.generators.registry.settings import RegistryMethodSettings, VerdictSettings
from attrib.generators.signals.degradations import parse
from attrib.generators.signals.samples import drawn_sample, recoded

METHOD = RegistryMethodSettings(name="log-spectrum", uri="method")
DEGRADATIONS = ("none", "jpeg-85", "resize-0.5")


@pytest.fixture(scope="module")
def method():
    return spectrum_method()


@pytest.fixture
def registry(method, tmp_path):
    return new_registry(str(tmp_path / "registry"), METHOD, method, DEGRADATIONS, STORAGE)


def test_an_entry_is_read_back_with_its_references_under_each_degradation(registry, method):
    samples = [*drawn_samples("nearest", range(8)), *drawn_samples("nearest", range(8, 12), px=24)]
    registry, entry = register(registry, "a", "generator", [samples], method, STORAGE)
    opened = open_registry(registry.uri, STORAGE)
    assert opened == registry and opened.generators == [entry] and opened.digest == registry.digest
    references = opened.read(entry, STORAGE)
    assert references.shape[:2] == (3, 12) and entry.sides_px == (24, 48) and entry.codecs == {"PNG": 12}
    for degradation, rows in zip(DEGRADATIONS, references):
        kept = [recoded(sample, parse(degradation)) for sample in samples]
        large = [sample.side_px >= method.min_side_px for sample in kept]
        expected = method.embed([sample for sample, ok in zip(kept, large) if ok])
        assert np.isnan(rows[~np.array(large)]).all() and np.array_equal(rows[large], expected)
    assert np.isnan(references[2, 8:]).all()  # 12 px are too few


@pytest.mark.parametrize(
    ("name", "num_images", "message"),
    [("a", 12, "'a' is in .* already .version 1.; set new_version"), ("b", 9, "'b' has 9 distinct images .* needs 10")],
)
def test_invalid_registrations_are_refused_and_change_nothing(registry, method, name, num_images, message):
    registry, _ = register(registry, "a", "generator", [drawn_samples("nearest", range(10))], method, STORAGE)
    with pytest.raises(AttribError, match=message):
        register(registry, name, "generator", [drawn_samples("nearest", range(num_images))], method, STORAGE)
    assert open_registry(registry.uri, STORAGE) == registry


def test_copies_and_images_that_are_too_small_do_not_count(registry, method):
    samples = drawn_samples("nearest", [*range(9), 0, 1, 2])
    with pytest.raises(
        AttribError,
        match=r"has 9 distinct images that can be assessed .left out: 3 copies, 10 too small. .* of 16 px or more",
    ):
        register(
            registry, "a", "generator", [samples + drawn_samples("nearest", range(20, 30), px=14)], method, STORAGE
        )
    assert not STORAGE.names(f"{registry.uri}/references")


def test_images_refused_as_queries_are_refused_as_references(registry, method):
    blank = [drawn_sample(torch.full((3, 48, 48), level, dtype=torch.uint8)) for level in (10, 50, 200)]
    small = drawn_samples("nearest", range(20, 22), px=14)
    images = [*drawn_samples("nearest", range(7)), *blank]
    with pytest.raises(
        AttribError, match=r"'a' has 7 distinct images that can be assessed .left out: 3 blank. and needs 10"
    ):
        register(registry, "a", "generator", [images], method, STORAGE)
    images = [*drawn_samples("nearest", range(10)), *blank, *small, *drawn_samples("nearest", range(4))]
    registry, entry = register(registry, "a", "generator", [images], method, STORAGE, left_out={"not readable": 2})
    assert entry.left_out == {"blank": 3, "copies": 4, "not readable": 2, "too small": 2} and entry.num_images == 10
    assert open_registry(registry.uri, STORAGE).generators == [entry]
    sources = as_sources([*drawn_samples(None, range(6)), *blank, *drawn_samples(None, range(6, 12))], "photographs")
    _, entry = register(registry, "camera", "photographs", sources, method, STORAGE)
    assert entry.source_sizes == (1,) * 12


def test_changes_from_an_old_record_are_made_to_the_present_one(registry, method):
    samples = [drawn_samples("nearest", range(10))]
    theirs, _ = register(registry, "theirs", "generator", samples, method, STORAGE)
    both, _ = register(registry, "mine", "generator", samples, method, STORAGE)
    assert [entry.name for entry in both.entries] == ["theirs", "mine"] and both.generation == 2
    with pytest.raises(AttribError, match="'mine' is in"):
        register(registry, "mine", "generator", samples, method, STORAGE)
    left = remove(theirs, "theirs", STORAGE)
    assert open_registry(registry.uri, STORAGE) == left and [entry.name for entry in left.entries] == ["mine"]
    assert STORAGE.names(f"{registry.uri}/references") == [left.entries[0].files[0].removeprefix("references/")]
    assert left.read(left.entries[0], STORAGE).shape[1] == 10


def test_a_first_registration_that_dies_leaves_an_empty_registry(registry, method, monkeypatch):
    """A job may not touch files that no record names."""
    samples = [drawn_samples("nearest", range(10))]

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(STORAGE, "write_array", die)
        register(registry, "a", "generator", samples, method, STORAGE)
    left = open_registry(registry.uri, STORAGE)
    assert left == registry and not left.entries
    again, entry = register(left, "a", "generator", samples, method, STORAGE)
    assert open_registry(registry.uri, STORAGE) == again and again.entries == (entry,)


def test_no_entry_is_lost_when_many_runs_register_at_once(registry, method):
    names = [f"g{i}" for i in range(8)]

    def add(name):
        return register(registry, name, "generator", [drawn_samples("nearest", range(10))], method, STORAGE)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, names))
        again = ([drawn_samples("nearest", range(10, 20))], method, STORAGE, True)
        versions = pool.map(lambda _: register(registry, "g0", "generator", *again)[1].version, range(4))
        assert sorted(versions) == [2, 3, 4, 5]
    found = open_registry(registry.uri, STORAGE)
    assert sorted({entry.name for entry in found.entries}) == names and len(found.entries) == 12
    assert all(np.isfinite(found.read(entry, STORAGE)).any() for entry in found.entries)


def test_references_under_the_name_of_earlier_versions_are_read(registry, method):
    registry, entry = register(registry, "a", "generator", [drawn_samples("nearest", range(10))], method, STORAGE)
    new, old = (Path(registry.uri) / name for name in entry.files)
    new.rename(old)
    assert registry.read(entry, STORAGE).shape[1] == 10
    remove(registry, "a", STORAGE)
    assert not old.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda record: "not json",
        lambda record: "[]",
        lambda record: json.dumps({"entries": []}),
        lambda record: json.dumps(record | {"method": {"name": "nope"}}),
        lambda record: json.dumps(record | {"entries": [{"name": "a"}]}),
        lambda record: json.dumps(record | {"entries": [record["entries"][0] | {"sides_px": "wide"}]}),
        lambda record: json.dumps(record | {"degradations": None}),
    ],
)
def test_a_damaged_record_is_named_with_the_remedy(registry, method, change):
    register(registry, "a", "generator", [drawn_samples("nearest", range(10))], method, STORAGE)
    place = f"{registry.uri}/registry.json"
    record = STORAGE.read_json(place)
    del record["record_sha256"]  # else all of these would only be records with another checksum
    STORAGE.write_bytes(place, change(record).encode())
    with pytest.raises(AttribError, match=r"registry\.json is damaged .* restore it from a copy, or delete"):
        open_registry(registry.uri, STORAGE)


def test_a_record_of_an_earlier_version_is_read(registry, method):
    registry, _ = register(registry, "a", "generator", [drawn_samples("nearest", range(10))], method, STORAGE)
    place = f"{registry.uri}/registry.json"
    record = STORAGE.read_json(place)
    del record["entries"][0]["left_out"], record["record_sha256"]
    STORAGE.write_json(place, record)
    assert open_registry(registry.uri, STORAGE).digest == registry.digest


def test_versions_follow_each_other_and_the_newest_is_used(registry, method):
    for version, trace in ((1, "nearest"), (2, "stripes")):
        registry, entry = register(
            registry, "a", "generator", [drawn_samples(trace, range(10))], method, STORAGE, new_version=version > 1
        )
        assert entry.version == version and registry.generators == [entry]
    with pytest.raises(AttribError, match="was registered with role 'generator'"):
        register(registry, "a", "photographs", [drawn_samples(None, range(10))], method, STORAGE, new_version=True)
    before = registry.digest
    registry = remove(registry, "a", STORAGE, version=2)
    assert [entry.version for entry in registry.generators] == [1] and registry.digest != before
    registry = remove(registry, "a", STORAGE)
    assert not registry.entries and not STORAGE.names(f"{registry.uri}/references")
    with pytest.raises(AttribError, match="has no entry 'a'; it has nothing"):
        remove(registry, "a", STORAGE)


def test_another_method_another_file_and_leak_controls_are_refused(registry, method, tmp_path):
    registry, entry = register(registry, "a", "generator", [drawn_samples("nearest", range(10))], method, STORAGE)
    with pytest.raises(MismatchError, match="fingerprints of another log-spectrum"):
        registry.check_method(Vectors())
    array = STORAGE.read_array(f"{registry.uri}/{entry.files[0]}")
    STORAGE.write_array(f"{registry.uri}/{entry.files[0]}", array[:, ::-1])
    with pytest.raises(AttribError, match="is not the file that was registered; restore it, or remove 'a'"):
        registry.read(entry, STORAGE)
    with pytest.raises(AttribError, match="is a leak control"):
        new_registry(str(tmp_path / "other"), METHOD, CodecAndSize(), DEGRADATIONS, STORAGE)


def raw_scores(references, scoring, degradation, own, i, kept_groups, without=None):
    """[galleries, G] of one reference by galleries of these groups, each without its reference at place `without`."""
    raw = np.full((2, len(references)), np.nan)
    query = references[own][degradation, i]
    for gallery in range(2) if not np.isnan(query).any() else ():
        kept = [
            np.stack([v for j, v in enumerate(references[g][gallery]) if j != without and not np.isnan(v).any()])
            for g in kept_groups
        ]
        raw[gallery, kept_groups] = SCORINGS[scoring](kept)(query[None])[0]
    return raw


@pytest.mark.parametrize("scoring", ["cosine", "nearest", "adapted"])
def test_leave_one_out_equals_galleries_built_without_the_reference(scoring):
    generator = np.random.default_rng(0)
    references = [unit(generator.standard_normal((2, size, 5))) for size in (4, 6, 3)]
    references[1][1, 2] = np.nan
    galleries = Galleries(Vectors(scoring), references)
    found, owner = galleries.leave_one_out()
    unregistered = galleries.as_unregistered(np.array([0, 1, 0]))
    assert owner.tolist() == [0] * 4 + [1] * 6 + [2] * 3
    place = [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1, 2]
    others = {0: [1], 1: [0, 2], 2: [1]}  # the first and the third generator are one family
    for degradation in range(2):
        for row, (own, i) in enumerate(zip(owner, place)):
            expected = raw_scores(references, scoring, degradation, own, i, [0, 1, 2], without=i)
            np.testing.assert_allclose(found[degradation, row], expected, atol=1e-5)
            expected = raw_scores(references, scoring, degradation, own, i, others[own])
            np.testing.assert_allclose(unregistered[degradation, row], expected, atol=1e-5)
    assert np.isnan(galleries.as_unregistered(np.zeros(3, int))).all()  # no other family is registered


def test_a_query_scores_highest_in_the_gallery_of_its_degradation(method):
    references = [embed_degraded(method, drawn_samples(t, range(12)), DEGRADATIONS[:2]) for t in ("nearest", "stripes")]
    queries = embed_degraded(method, drawn_samples("nearest", range(100, 120)), DEGRADATIONS[:2])
    galleries = Galleries(method, references)
    for degradation in range(2):
        chosen = galleries.scores(queries[degradation]).reshape(20, -1).argmax(axis=1)
        assert (chosen == 2 * degradation).mean() > 0.8  # the first generator, in the gallery of the same degradation


def test_halves_of_one_generator_are_a_family_and_two_generators_are_not():
    """60 registries of four entries, two of them of one generator, at a level of 0.05."""
    generator = np.random.default_rng(1)
    joined = apart = 0
    for _ in range(60):
        centres = generator.standard_normal((3, 16))
        groups = [around(centres[c], 12, 0.5, generator)[None] for c in (0, 0, 1, 2)]
        own, owner = Galleries(Vectors(), groups).leave_one_out()
        label = families(own[0, :, 0], owner, accuracy=0.6, level=0.05)
        joined += label[1] == 0
        apart += label[2] == 2 and label[3] == 3
    assert joined >= 56 and apart >= 56


def test_families_are_transitive_and_named_by_their_first_member():
    scores = np.zeros((6, 3), np.float32)
    owner = np.array([0, 0, 1, 1, 2, 2])
    scores[:2, 0], scores[4:, 2] = 1, 1  # 0 and 2 are told apart, 1 from neither
    assert [compare(scores, owner, 0, other, 0.5) for other in (2, 1)] == [(1, 1 / 16), (0.5, pytest.approx(11 / 16))]
    assert families(scores, owner, 0.5, 0.1).tolist() == [0, 0, 0]
    scores[2:4, 1] = 1
    assert families(scores, owner, 0.5, 0.1).tolist() == [0, 1, 2]


def test_entries_list_self_similarity_and_nearest_generator(registry, method):
    for name, trace, seeds in (
        ("a", "nearest", range(10)),
        ("a-again", "nearest", range(50, 60)),
        ("b", "checker", range(10)),
    ):
        registry, _ = register(registry, name, "generator", [drawn_samples(trace, seeds)], method, STORAGE)
    photographs = as_sources(drawn_samples(None, range(10)), "photographs")
    registry, _ = register(registry, "camera", "photographs", photographs, method, STORAGE)
    rows = {row["name"]: row for row in describe(registry, method, VerdictSettings(), STORAGE)}
    assert (
        rows["a"]["nearest"] == "a-again" and rows["a"]["family"] == ["a", "a-again"] and rows["b"]["family"] == ["b"]
    )
    assert rows["camera"]["num_sources"] == 10 and rows["b"]["num_sources"] == 1
    references = registry.read(registry.generators[2], STORAGE)[0]
    own = [mean_cosine([np.delete(references, i, axis=0)])(references[i : i + 1])[0, 0] for i in range(10)]
    assert rows["b"]["self_similarity"] == pytest.approx(np.mean(own), abs=1e-4)
