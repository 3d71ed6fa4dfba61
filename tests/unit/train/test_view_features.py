"""Features of images and their views: seeds, donors, damaged images, and files."""

import io
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from support.files import LOCAL
from support.hostile import encode
from support.images import picture
from support.training import collection, train_settings

from attrib.common.errors import AttribError
from attrib.data.decoding import decode_image
from attrib.models.encoder import load_network
from attrib.models.features import FeatureExtractor
from attrib.models.model import features_data_config
from attrib.models.preprocessing import Preprocessing
from attrib.train import view_features
from attrib.train.augment.settings import DONOR_KINDS, KINDS
from attrib.train.augment.views import draw_kind, view_generator
from attrib.train.settings import TrainSettings
from attrib.train.view_features import (
    COLUMNS,
    MARGIN,
    NO_DONOR,
    ORIGINAL,
    ViewFeatures,
    decode_images,
    draw_view,
    extract_chunk,
    read_chunks,
    sheet_of_views,
    write_chunk,
)

VIEW_PX = 48
NUM_VIEWS = 3

pytestmark = pytest.mark.usefixtures("one_thread")


def settings_of(seed: int = 0, mix: dict | None = None) -> TrainSettings:
    return train_settings(
        features={"moment_levels": [0], "layout_levels": [2], "layout_grid": 2},
        views={"num_donor_patches": 40, "mix": mix or {"texture": 1, "colour": 2, "bands": 2, "solo": 2}},
        seed=seed,
    )


SETTINGS = settings_of()


@pytest.fixture(scope="module")
def network() -> tuple[FeatureExtractor, Preprocessing]:
    network = load_network(SETTINGS.backbone, LOCAL)
    model = network.model.eval()
    data_config = features_data_config(network.data_config, SETTINGS.features) | {"input_size": (3, VIEW_PX, VIEW_PX)}
    return FeatureExtractor(model, SETTINGS.features, VIEW_PX), Preprocessing.from_timm(data_config)


def drawn(num: int) -> dict[str, bytes]:
    return {f"{seed}.jpg": encode(picture(seed, 60 + seed, 50), "JPEG") for seed in range(num)}


def extract(rows, manifest, network, settings=SETTINGS, num_views=NUM_VIEWS) -> ViewFeatures:
    return extract_chunk(decode_images(rows, manifest, network[1], LOCAL), *network, settings, num_views)


def same(first: ViewFeatures, second: ViewFeatures) -> bool:
    """Whether all bits are equal."""
    equal = (getattr(first, name).tobytes() == getattr(second, name).tobytes() for name in COLUMNS)
    shapes = (getattr(first, name).shape == getattr(second, name).shape for name in COLUMNS)
    return all(equal) and all(shapes) and first.failures == second.failures


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    return collection(drawn(6), tmp_path_factory.mktemp("six"))


@pytest.fixture(scope="module")
def chunk(six, network) -> ViewFeatures:
    return extract(*six, network)


def test_rows_are_images_and_their_views_in_order(six, chunk, network):
    ids = six[0]["id"].to_pylist()
    assert chunk.content.tolist() == [image_id for image_id in ids for _ in range(1 + NUM_VIEWS)]
    assert chunk.view.tolist() == [ORIGINAL, *range(NUM_VIEWS)] * 6 and chunk.failures == []
    assert chunk.features.shape == (24, network[0].dimension) and chunk.features.dtype == np.float16
    assert chunk.content.dtype == chunk.donor.dtype == chunk.view.dtype == chunk.kind.dtype == np.int64
    assert np.array_equal(np.flatnonzero(chunk.is_original), np.arange(0, 24, 1 + NUM_VIEWS))
    assert (chunk.donor[chunk.is_original] == NO_DONOR).all() and (chunk.kind[chunk.is_original] == ORIGINAL).all()


@torch.inference_mode()
def test_features_equal_those_of_images_and_drawn_views(six, chunk, network):
    extractor, preprocessing = network
    decoded = decode_images(*six, preprocessing, LOCAL)
    for row in range(24):
        position, view = divmod(row, 1 + NUM_VIEWS)
        if view == 0:
            # Images this small are not shrunk for views.
            pixels, donor, kind = preprocessing.resize_and_crop(decoded.pixels[position]), NO_DONOR, ORIGINAL
        else:
            pixels, donor, name = draw_view(decoded, position, view - 1, SETTINGS.views, VIEW_PX, SETTINGS.seed)
            kind = KINDS.index(name)
        assert pixels.shape == (3, VIEW_PX, VIEW_PX) and pixels.dtype == torch.uint8
        assert (chunk.donor[row], chunk.kind[row]) == (donor, kind)
        expected = extractor(preprocessing.normalise(pixels[None], "cpu", torch.float32))[0]
        np.testing.assert_allclose(chunk.features[row], expected, rtol=2e-2, atol=2e-3)  # float16; batches of one


def test_a_chunk_depends_on_the_seed_only(six, chunk, network):
    torch.manual_seed(5)  # the global generator has no effect
    assert same(extract(*six, network), chunk)
    other = extract(*six, network, settings_of(seed=1))
    originals = chunk.is_original
    assert np.array_equal(other.features[originals], chunk.features[originals])
    assert (other.features[~originals] != chunk.features[~originals]).any(axis=1).all()


def test_views_differ_from_each_other_and_from_their_image(chunk):
    rows = {row.tobytes() for row in chunk.features}
    assert len(rows) == len(chunk.features)


def test_fewer_views_are_the_first_of_more_views(six, chunk, network):
    fewer = extract(*six, network, num_views=1)
    assert fewer.view.tolist() == [ORIGINAL, 0] * 6
    assert np.array_equal(fewer.donor, chunk.donor[chunk.view < 1])
    assert np.array_equal(fewer.kind, chunk.kind[chunk.view < 1])
    np.testing.assert_allclose(fewer.features, chunk.features[chunk.view < 1], rtol=2e-2, atol=2e-3)
    assert extract(*six, network, num_views=0).is_original.all()


def test_donors_are_all_other_images_of_the_chunk(six, network):
    settings = settings_of(mix={"texture": 0, "colour": 3, "bands": 0, "solo": 1})
    decoded = decode_images(*six, network[1], LOCAL)
    for position, image_id in enumerate(decoded.ids):
        donors = Counter()
        for view in range(100):
            _, donor, found = draw_view(decoded, position, view, settings.views, 16, seed=0)
            kind = draw_kind(settings.views, view_generator(0, image_id, view))
            assert found == kind and (donor == NO_DONOR) == (kind == "solo")
            donors[donor] += 1
        assert donors.keys() == {NO_DONOR, *decoded.ids} - {image_id}


def test_views_without_a_donor_do_not_depend_on_the_chunk(six, network):
    rows, manifest = six
    settings = settings_of(mix={"texture": 0, "colour": 0, "bands": 0, "solo": 1})
    whole, part = (decode_images(some, manifest, network[1], LOCAL) for some in (rows, rows.slice(3, 2)))
    for view in range(5):
        first, second = (draw_view(d, i, view, settings.views, VIEW_PX, 0) for d, i in ((whole, 4), (part, 1)))
        assert torch.equal(first[0], second[0]) and first[1:] == second[1:] == (NO_DONOR, "solo")


@pytest.mark.parametrize("mix", [None, {"texture": 1, "colour": 0, "bands": 0, "solo": 0}])
def test_an_image_alone_in_its_chunk_has_views_without_donors(mix, six, network):
    rows, manifest = six
    alone = extract(rows.slice(2, 1), manifest, network, settings_of(mix=mix))
    assert alone.view.tolist() == [ORIGINAL, 0, 1, 2] and (alone.donor == NO_DONOR).all()
    solo = KINDS.index("solo")  # the kind rendered, not the kind drawn
    assert alone.kind.tolist() == [ORIGINAL, solo, solo, solo]
    assert set(alone.content.tolist()) == {rows["id"][2].as_py()} and len(np.unique(alone.features, axis=0)) == 4


def test_damaged_images_are_failures_and_others_are_kept(network, tmp_path):
    damaged = {"cut.png": encode(picture(0), "PNG")[:200], "text.jpg": b"no image", "void.jpg": b""}
    rows, manifest = collection(drawn(4) | damaged | {"gone.jpg": b"soon"}, tmp_path / "c")
    (tmp_path / "c" / "gone.jpg").unlink()
    ids = dict(zip(rows["key"].to_pylist(), rows["id"].to_pylist()))
    found = extract(rows, manifest, network)
    failures = {failure["id"]: failure for failure in found.failures}
    assert failures.keys() == {ids[key] for key in (*damaged, "gone.jpg")} and len(found.failures) == 4
    assert failures[ids["gone.jpg"]]["stage"] == "read" and failures[ids["cut.png"]]["stage"] == "decode"
    assert all(failure["reason"] and failure.keys() == {"id", "stage", "reason"} for failure in found.failures)
    good = {image_id for key, image_id in ids.items() if image_id not in failures}
    assert Counter(found.content.tolist()) == dict.fromkeys(good, 1 + NUM_VIEWS)
    assert set(found.donor.tolist()) <= good | {NO_DONOR} and (found.donor != found.content).all()
    expected = extract(
        rows.filter(pa.array([image_id in good for image_id in rows["id"].to_pylist()])), manifest, network
    )
    assert same(replace(found, failures=[]), expected)


def test_large_images_are_shrunk_for_views(network, tmp_path):
    sizes = {"wide.png": (300, 200), "tall.png": (72, 400), "small.png": (71, 90), "tiny.png": (5, 4)}
    images = {key: encode(picture(0, *size), "PNG") for key, size in sizes.items()}
    rows, manifest = collection(images, tmp_path)
    decoded = decode_images(rows, manifest, network[1], LOCAL)
    shapes = {key: tuple(pixels.shape[:0:-1]) for key, pixels in zip(rows["key"].to_pylist(), decoded.pixels)}
    assert shapes == {"wide.png": (108, 72), "tall.png": (72, 400), "small.png": (71, 90), "tiny.png": (5, 4)}


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@torch.inference_mode()
def test_network_input_comes_from_the_full_size_image(crop_mode, network, tmp_path):
    extractor, preprocessing = network[0], replace(network[1], crop_mode=crop_mode)
    sizes = {"wide.png": (300, 200), "tall.jpg": (150, 900), "square.jpg": (160, 160), "small.png": (71, 90)}
    images = {
        key: encode(picture(i, *size), {"png": "PNG", "jpg": "JPEG"}[key[-3:]])
        for i, (key, size) in enumerate(sizes.items())
    }
    rows, manifest = collection(images, tmp_path)
    decoded = decode_images(rows, manifest, preprocessing, LOCAL)
    found = extract(rows, manifest, (extractor, preprocessing), num_views=1)
    originals = dict(zip(found.content[found.is_original].tolist(), found.features[found.is_original]))
    assert len(decoded.prepared) == len(decoded.ids) == len(originals) == 4
    for key, image_id, prepared, shrunk in zip(rows["key"].to_pylist(), decoded.ids, decoded.prepared, decoded.pixels):
        whole = decode_image(images[key], max_megapixels=1).pixels
        expected = preprocessing.resize_and_crop(whole)
        assert prepared.dtype == torch.uint8 and prepared.shape == (3, VIEW_PX, VIEW_PX)
        assert torch.equal(prepared, expected)
        is_large = min(sizes[key]) > MARGIN * VIEW_PX
        assert torch.equal(shrunk, whole) != is_large  # so that the next line can fail
        assert torch.equal(preprocessing.resize_and_crop(shrunk), expected) != is_large
        features = extractor(preprocessing.normalise(expected[None], "cpu", torch.float32))[0]
        np.testing.assert_allclose(originals[image_id], features, rtol=2e-2, atol=2e-3)


def test_kinds_are_drawn_by_the_seed(six, network):
    for seed in (0, 7):
        settings = settings_of(seed)
        found = extract(*six, network, settings, num_views=8)
        assert (found.kind[found.is_original] == ORIGINAL).all()
        for row in np.flatnonzero(~found.is_original):
            generator = view_generator(seed, int(found.content[row]), int(found.view[row]))
            kind = draw_kind(settings.views, generator)
            assert KINDS[found.kind[row]] == kind and (found.donor[row] != NO_DONOR) == (kind in DONOR_KINDS)
        assert set(found.kind.tolist()) == {ORIGINAL, *range(len(KINDS))}


def test_take_keeps_every_column(chunk):
    whole = replace(chunk, failures=[{"id": 1, "stage": "read", "reason": "gone"}])
    mask = chunk.view == 1
    for rows in (np.array([7, 2, 2, 23]), np.array([], np.int64), mask, ~mask, np.flatnonzero(mask)):
        some = whole.take(rows)
        assert isinstance(some, ViewFeatures) and some.failures == whole.failures
        for name in COLUMNS:
            found, column = getattr(some, name), getattr(whole, name)
            assert found.dtype == column.dtype and np.array_equal(found, column[rows])
        assert np.array_equal(some.is_original, chunk.is_original[rows])
    assert same(whole.take(mask), whole.take(np.flatnonzero(mask)))
    assert same(whole.take(np.arange(len(mask))), whole)


def test_real_images_have_features_and_views(real_images, network, tmp_path):
    rows, manifest = collection({f"{i}.jpg": data for i, data in enumerate(real_images[:3])}, tmp_path)
    found = extract(rows, manifest, network, num_views=2)
    assert found.failures == [] and found.features.shape[0] == 9 and np.isfinite(found.features).all()
    decoded = decode_images(rows, manifest, network[1], LOCAL)
    for key, pixels in zip(rows["key"].to_pylist(), decoded.pixels):
        image = Image.open(io.BytesIO(real_images[int(key[0])])).convert("RGB")
        small = np.asarray(image.resize(pixels.shape[:0:-1], Image.Resampling.BILINEAR)).astype(int)
        assert abs(pixels.permute(1, 2, 0).numpy() - small).mean() < 1.0


def test_features_beyond_float16_are_an_error(six, network):
    class Large(torch.nn.Linear):
        dimension, sizes = 3, {"pooled": 1, "moments": 2}

        def forward(self, images):
            return torch.tensor([0, 0, 1e6]).expand(len(images), 3)

    first = six[0]["id"][0].as_py()
    with pytest.raises(AttribError, match=f"feature block moments of image {first} holds NaN or values above"):
        extract(*six, (Large(1, 1), network[1]))


def test_batch_size_has_no_effect(six, network, monkeypatch):
    expected = extract(*six, network)
    for size in (1, 5, 24, 100):
        monkeypatch.setattr(view_features, "BATCH_SIZE", size)
        found = extract(*six, network)
        np.testing.assert_allclose(found.features, expected.features, rtol=2e-2, atol=2e-3)
        assert np.array_equal(found.donor, expected.donor) and np.array_equal(found.kind, expected.kind)


def test_chunks_are_joined_in_the_given_order(six, chunk, network, tmp_path):
    rows, manifest = six
    failures = [
        {"id": 2**62, "stage": "decode", "reason": 'ä "quoted" reason'},
        {"id": 3, "stage": "read", "reason": ""},
    ]
    second = extract(rows.slice(0, 2), manifest, network)
    second = replace(second, failures=failures)
    uris = [str(tmp_path / "part-00000" / f"{name}.safetensors") for name in "ab"]
    for uri, written in zip(uris, (chunk, second)):
        write_chunk(uri, written, LOCAL)
        assert same(read_chunks([uri], LOCAL), written)
    joined = read_chunks(uris[::-1], LOCAL)
    assert joined.failures == failures and len(joined.features) == 24 + 8
    assert np.array_equal(joined.features, np.concatenate([second.features, chunk.features]))
    assert joined.content.tolist() == [*second.content, *chunk.content]
    assert joined.kind.tolist() == [*second.kind, *chunk.kind]


def test_a_chunk_without_a_decodable_image_round_trips(chunk, network, tmp_path):
    rows, manifest = collection({"a.jpg": b"", "b.png": b"no image"}, tmp_path / "c")
    empty = extract(rows, manifest, network)
    assert sheet_of_views(rows, manifest, network[1], settings_of(), LOCAL) is None
    assert empty.features.shape == (0, network[0].dimension) and len(empty.failures) == 2
    assert empty.content.shape == empty.donor.shape == empty.view.shape == empty.kind.shape == (0,)
    uris = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    write_chunk(uris[0], empty, LOCAL)
    write_chunk(uris[1], chunk, LOCAL)
    assert same(read_chunks(uris[:1], LOCAL), empty)
    joined = read_chunks(uris, LOCAL)
    assert np.array_equal(joined.features, chunk.features) and joined.failures == empty.failures


def test_chunk_round_trip_through_every_storage(chunk, tmp_path, local):
    uri = str(tmp_path / "store" / "rows.safetensors")
    write_chunk(uri, chunk, local)
    assert same(read_chunks([uri], local), chunk)


def test_a_damaged_chunk_is_refused_by_name(tmp_path, local):
    ids, uri = np.arange(3), str(tmp_path / "chunk.safetensors")
    write_chunk(uri, ViewFeatures(np.ones((3, 2), np.float16), ids, ids, ids, ids, []), local)
    data = local.read_bytes(uri)
    for damaged in (b"", data[:100], data.replace(b"failures", b"failuret"), data.replace(b'"[]"', b'"[}"')):
        local.write_bytes(uri, damaged)
        with pytest.raises(AttribError, match=r"chunk\.safetensors is damaged .*; delete it"):
            read_chunks([uri], local)
