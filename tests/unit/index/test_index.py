"""Shards on disk: contents, deterministic builds, and errors of damaged files."""

import shutil
from contextlib import nullcontext

import faiss
import numpy as np
import pytest
from support.files import full_disk
from support.shards import (
    KINDS,
    STORAGE,
    exact_scores,
    make_index,
    make_plan,
    make_sources,
    nearest,
    open_index_shards,
    write_embeddings,
)

from attrib.common.errors import AttribError, MismatchError
from attrib.embed.embeddings import Embeddings
from attrib.index import shard as shard_module
from attrib.index.index import Index, check_same_encoder
from attrib.index.normalize import unit_rows
from attrib.index.quantizer import train_quantizer
from attrib.index.search import merge, search_shard
from attrib.index.shard import build_shard

NUM, DIMENSION, K = 400, 16, 5


@pytest.fixture(scope="module")
def collection():
    generator = np.random.default_rng(5)
    vectors = generator.standard_normal((NUM, DIMENSION)).astype(np.float16)
    return generator.choice(1 << 62, NUM, replace=False), vectors


def answers(folder, records, queries, compressed, num_candidates=50):
    shards = open_index_shards(folder, records)
    parts = [search_shard(shard, queries, K, num_candidates, 3, compressed) for shard in shards]
    return merge(parts, K, num_candidates if compressed else None)


@pytest.mark.parametrize("kind", KINDS)
def test_shard_holds_vectors_by_list_and_sources_by_id(kind, collection, tmp_path):
    ids, vectors = collection
    failed = np.arange(NUM) % 7 == 0
    partition_of = np.arange(NUM) % 3
    records = make_index(tmp_path, ids, vectors, make_plan(kind), partition_of, [[2, 0], [1]], failed)
    for shard, members in enumerate(([0, 2], [1])):
        expected = np.flatnonzero(np.isin(partition_of, members) & ~failed)
        opened = open_index_shards(tmp_path, records)[shard]
        lists = np.zeros(len(expected), int)
        if kind != "flat":
            means = opened.quantizer.quantizer.reconstruct_n(0, opened.quantizer.nlist)
            lists = (unit_rows(vectors[expected]).astype(np.float64) @ means.T).argmax(axis=1)
            assert np.array_equal(np.diff(opened.offsets), np.bincount(lists, minlength=opened.quantizer.nlist))
            assert opened.offsets[0] == 0
        expected = expected[np.lexsort((ids[expected], lists))]
        assert np.array_equal(opened.ids, ids[expected])
        assert np.array_equal(opened.vectors, vectors[expected])
        np.testing.assert_allclose(
            opened.inverse_norms, 1 / np.linalg.norm(vectors[expected].astype(float), axis=1), rtol=1e-6
        )
        assert np.array_equal(opened.positions_of(opened.ids[[5, 2, 9]]), [5, 2, 9])
        assert (opened.codes is not None) == (kind in ("ivf_sq8", "ivf_pq"))
        sources = STORAGE.read_table(str(tmp_path / f"shard-{shard:05d}" / "sources.parquet"))
        by_id = np.sort(ids[expected])
        everything = make_sources(ids)
        assert sources.equals(everything.take(np.searchsorted(everything["id"].to_numpy(), by_id)))
        assert sources["key"].to_pylist() == [f"{i}.jpg" for i in by_id]


@pytest.mark.parametrize("kind", ["ivf_sq8", "ivf_pq"])
def test_codes_equal_those_of_faiss(kind, collection, tmp_path):
    ids, vectors = collection
    opened = open_index_shards(tmp_path, make_index(tmp_path, ids, vectors, make_plan(kind), np.zeros(NUM, int)))[0]
    lists = faiss.clone_index(opened.quantizer)
    lists.add_with_ids(unit_rows(opened.vectors), opened.ids)
    for number in range(lists.nlist):
        rows = slice(opened.offsets[number], opened.offsets[number + 1])
        size = lists.invlists.list_size(number)
        kept = faiss.rev_swig_ptr(lists.invlists.get_ids(number), size)
        codes = faiss.rev_swig_ptr(lists.invlists.get_codes(number), size * lists.code_size).reshape(size, -1)
        assert np.array_equal(kept, opened.ids[rows]) and np.array_equal(codes, opened.codes[rows])


@pytest.mark.parametrize("kind", KINDS)
def test_build_is_deterministic(kind, collection, tmp_path):
    built = []
    for name in ("first", "second"):
        ids, vectors = collection
        built.append(make_index(tmp_path / name, ids, vectors, make_plan(kind), np.arange(NUM) % 2))
        assert len(built[-1][0]["files"]) == {"flat": 3, "ivf_flat": 4}.get(kind, 5)
    assert built[0] == built[1]


@pytest.mark.parametrize("kind", KINDS)
def test_build_leaves_no_scratch_files(kind, collection, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(shard_module, "scratch_folder", lambda: nullcontext(str(scratch)))
    ids, vectors = collection
    make_index(tmp_path, ids, vectors, make_plan(kind), np.zeros(NUM, int))
    assert not list(scratch.iterdir())  # publishing moves a file


@pytest.mark.parametrize("kind", KINDS)
def test_results_do_not_depend_on_the_partitions(kind, collection, tmp_path):
    ids, vectors = collection
    queries = unit_rows(vectors[:30])
    shuffled = np.random.default_rng(6).permutation(NUM)
    builds = {
        "one": (np.arange(NUM), np.arange(NUM) % 4, [[0, 1, 2, 3]]),
        "other order": (np.arange(NUM), np.arange(NUM) % 4, [[3, 1, 0, 2]]),
        "pairs": (shuffled, np.arange(NUM) % 4, [[0, 2], [1, 3]]),
        "uneven": (shuffled, np.minimum(np.arange(NUM) // 30, 5), [[0], [1, 2], [3, 4, 5]]),
    }
    found = {}
    for name, (order, partition_of, groups) in builds.items():
        folder = tmp_path / name
        records = make_index(folder, ids[order], vectors[order], make_plan(kind), partition_of, groups)
        found[name] = answers(folder, records, queries, kind in ("ivf_sq8", "ivf_pq"))
    assert len(found["one"].id) == K * len(queries)
    for name in builds:
        assert np.array_equal(found[name].id, found["one"].id) and np.array_equal(found[name].score, found["one"].score)


@pytest.mark.parametrize("name", ["vectors.npy", "inverse_norms.npy", "ids.npy", "offsets.npy", "codes.npy"])
@pytest.mark.parametrize("damage", ["flipped bit", "cut off"])
def test_damaged_file_is_named(damage, name, collection, tmp_path):
    ids, vectors = collection
    records = make_index(tmp_path, ids, vectors, make_plan("ivf_pq"), np.zeros(NUM, int))
    assert len(open_index_shards(tmp_path, records)) == 1
    path = tmp_path / "shard-00000" / name
    data = bytearray(path.read_bytes())
    if damage == "cut off":
        del data[-1]
    else:
        data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(AttribError, match=rf"shard-00000/{name} is damaged.*delete its shard folder and index.json"):
        open_index_shards(tmp_path, records)


@pytest.mark.parametrize("kind", KINDS)
def test_open_shard_survives_deletion_of_its_files(kind, collection, tmp_path):
    """A worker copies a remote shard to a scratch folder; the memory-mapped files outlive the folder."""
    ids, vectors = collection
    records = make_index(tmp_path, ids, vectors, make_plan(kind, 3), np.zeros(NUM, int))
    shards = open_index_shards(tmp_path, records)
    shutil.rmtree(tmp_path)
    found = search_shard(shards[0], unit_rows(vectors[:40]), K, NUM, 3, False)
    expected, _ = nearest(exact_scores(unit_rows(vectors[:40]), vectors), ids, K)
    assert np.array_equal(found.id[found.query == 7], expected[7]) or kind in ("ivf_sq8", "ivf_pq")
    assert np.array_equal(merge([found], 1).id, ids[:40])


def test_images_missing_in_the_manifest_are_an_error(collection, tmp_path):
    ids, vectors = collection
    embeddings = write_embeddings(tmp_path, ids, vectors, np.zeros(NUM, int))
    for kept in (np.sort(ids)[:-1], np.sort(ids)[1:], ids[:0]):
        with pytest.raises(MismatchError, match=f"holds {NUM - len(kept)} images that .*manifest does not list"):
            build_shard(str(tmp_path / "shard"), embeddings, [0], None, make_sources(kept), STORAGE)
    assert not (tmp_path / "shard").exists()


@pytest.mark.parametrize("dimension", [1, 7])
@pytest.mark.parametrize("num_vectors", [2, 39, 50])
@pytest.mark.parametrize("kind", ["ivf_flat", "ivf_sq8", "ivf_pq"])
def test_few_vectors_and_odd_dimensions(kind, num_vectors, dimension, tmp_path):
    """PQ then trains fewer than 256 centroids; every vector must still be its own nearest neighbour."""
    generator = np.random.default_rng(7)
    ids, vectors = np.arange(num_vectors) * 3, generator.standard_normal((num_vectors, dimension)).astype(np.float16)
    plan = make_plan(kind, 2, 1)
    shards = open_index_shards(tmp_path, make_index(tmp_path, ids, vectors, plan, np.zeros(num_vectors, int)))
    queries = unit_rows(vectors)
    compressed = kind != "ivf_flat"
    found = merge([search_shard(shards[0], queries, 1, 2 * num_vectors, 2, compressed)], 1)
    assert np.array_equal(found.id, nearest(exact_scores(queries, vectors), ids, 1)[0][:, 0])


@pytest.mark.parametrize(
    "kind, num_lists, fewest", [("ivf_flat", 1, 1), ("ivf_flat", 40, 40), ("ivf_pq", 1, 2), ("ivf_sq8", 3, 3)]
)
def test_too_few_training_vectors_are_an_error(kind, num_lists, fewest, collection):
    training = unit_rows(collection[1])
    plan = make_plan(kind, num_lists)
    assert train_quantizer(training[:fewest], plan, 0).is_trained
    with pytest.raises(
        AttribError, match=rf"{num_lists} lists needs at least {fewest} training vectors and there are {fewest - 1}"
    ):
        train_quantizer(training[: fewest - 1], plan, 0)


def test_training_is_deterministic_for_a_seed(collection):
    training = unit_rows(collection[1])
    made = [faiss.serialize_index(train_quantizer(training, make_plan("ivf_pq"), seed)).tobytes() for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]


def test_queries_of_another_encoder_are_an_error():
    encoder = {"model_digest": "a", "preprocessing": "p", "dimension": 8}
    built = Index("/index", "d", encoder, make_plan("flat"), None, [], 0, 8, {}, [], True, {})

    def queries(**changes):
        return Embeddings("/queries", "/manifest", encoder | changes, "q", [1], [1])

    check_same_encoder(built, queries())
    for key, value in {"model_digest": "b", "preprocessing": "q", "dimension": 9}.items():
        with pytest.raises(
            MismatchError, match=rf"/queries were embedded with {key} {value!r}.*/index with {encoder[key]!r}"
        ):
            check_same_encoder(built, queries(**{key: value}))


def test_a_full_scratch_disk_is_an_error_that_names_the_file(collection, tmp_path):
    """NumPy says how many items were written and not why the others were not."""
    ids, vectors = collection
    embeddings = write_embeddings(tmp_path, ids, vectors, np.zeros(NUM, int))
    with full_disk(4_000), pytest.raises(OSError, match=r"unsorted.npy was written in part .*is the disk full\?"):
        build_shard(str(tmp_path / "shard"), embeddings, [0], None, make_sources(ids), STORAGE)
