"""Controls and leak controls against their definitions; all methods of the results table on a small pool."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from support.generators import STORAGE
from support.images import picture

from attrib.common.errors import AttribError
from attrib.generators.evaluation.controls import CodecAndSize, ContentOnly, methods_from
from attrib.generators.extractor.network import Extractor, FingerprintNetwork
from attrib.generators.extractor.settings import NetworkSettings
from attrib.generators.fingerprints.backbone import BackboneFeatures
from attrib.generators.fingerprints.discriminant import fit_discriminant, model_statistics
from attrib.generators.fingerprints.scoring import unit_or_zero
from attrib.generators.fingerprints.spectrum import (
    DISCRIMINANT,
    WHITENING,
    LogSpectrum,
    SpectrumDiscriminant,
    SpectrumWhitened,
    fitted_maps,
    load_spectrum_method,
    pool_spectra,
    spectra,
)
from attrib.generators.settings import (
    BackboneFeatureSettings,
    DiscriminantSettings,
    MethodsSettings,
    SpectrumSettings,
)
from attrib.generators.signals.degradations import degrade, parse
from attrib.generators.signals.samples import Sample, drawn_sample
from attrib.generators.signals.spectrum import colour_spectrum, log_spectrum, patches, residual
from attrib.generators.synthesis.architectures import build_autoencoder, sample_specs
from attrib.generators.synthesis.autoencoder import Trained, render
from attrib.generators.synthesis.pool import PlannedModel, Pool, write_model
from attrib.models.settings import BackboneSettings, FeatureSettings

pytestmark = pytest.mark.usefixtures("one_thread")

SPECTRUM = SpectrumSettings(patch_px=16, max_patches=4)
COLOURS = SpectrumSettings(patch_px=16, max_patches=4, window_px=8)
PLAIN = ["spectrum-lda", "spectrum-lda-adapted", "log-spectrum", "log-spectrum-adapted", "log-spectrum-logistic"]
COLOUR_NAMES = [f"colour-spectrum{name.removeprefix('spectrum').removeprefix('log-spectrum')}" for name in PLAIN]
NAMES = [*PLAIN, "spectrum-whitened"]
BACKBONE = BackboneSettings(name="test_resnet", weights="random")


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Pool:
    """Five small decoders that were never trained, so that their traces are strong."""
    uri = str(tmp_path_factory.mktemp("pool"))
    shown = torch.stack([image(seed, 32, 32) for seed in range(8)])
    models = []
    for seed, spec in enumerate(sample_specs(5, seed=0, width=4)):
        model = build_autoencoder(spec, seed).eval()
        planned = PlannedModel(model_id=f"{seed:04}", spec=spec, seed=seed)
        models.append(write_model(uri, planned, Trained(model, 0.1, 1), render(model, shown), STORAGE))
    return Pool(uri, models, px=32, num_photographs=8, digest="of five")


def image(seed: int, width: int = 64, height: int = 48) -> torch.Tensor:
    return torch.from_numpy(np.array(picture(seed, width, height))).permute(2, 0, 1)


def image_spectrum(pixels: torch.Tensor) -> np.ndarray:
    each = [log_spectrum(residual(patch[None].float() / 255))[0] for patch in patches(pixels, 16, 4)]
    return (sum(each) / len(each)).numpy().ravel()


def with_trace(pixels: torch.Tensor) -> torch.Tensor:
    """The same image with a chequerboard of two grey levels, whose mean over every area of even sides is zero."""
    height, width = pixels.shape[1:]
    board = (torch.arange(height)[:, None] + torch.arange(width)) % 2 * 4 - 2
    return (pixels.int().clamp(2, 253) + board).to(torch.uint8)


def test_the_log_spectrum_identifies_traces_across_content():
    plain, traced = ([change(image(seed)) for seed in range(8)] for change in (lambda pixels: pixels, with_trace))
    mean = spectra([drawn_sample(pixels) for pixels in plain + traced], SPECTRUM).mean(axis=0)
    method = LogSpectrum(mean, SPECTRUM)
    vectors = {name: method.embed([drawn_sample(p) for p in found]) for name, found in (("a", plain), ("b", traced))}
    expected = image_spectrum(plain[3]) - mean
    expected -= sum(expected) / len(expected)
    np.testing.assert_allclose(vectors["a"][3], expected / np.linalg.norm(expected), atol=1e-5)
    scores = method.scores([vectors["a"][:4], vectors["b"][:4]], np.concatenate([vectors["a"][4:], vectors["b"][4:]]))
    assert scores.argmax(axis=1).tolist() == [0] * 4 + [1] * 4


def test_a_spectrum_discriminant_is_cosine_in_its_space_and_its_digest_tells_fits_apart():
    samples = [drawn_sample(image(seed)) for seed in range(12)]
    rows = spectra(samples, SPECTRUM)
    fits = [fit_discriminant(model_statistics([rows[:6], rows[6:9], rows[9:]]), shrinkage) for shrinkage in (0.1, 0.2)]
    one, other = (SpectrumDiscriminant(fitted, SPECTRUM) for fitted in fits)
    expected = (rows.astype(np.float64) - fits[0].mean) @ fits[0].projection
    np.testing.assert_allclose(
        one.embed(samples), expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6
    )
    assert one.digest == SpectrumDiscriminant(fits[0], SPECTRUM).digest != other.digest
    assert SpectrumDiscriminant(fits[0], SpectrumSettings(patch_px=16, max_patches=1)).digest != one.digest
    with pytest.raises(AttribError, match="needs 16"):
        one.embed([drawn_sample(image(0, 15, 40))])


def test_content_only_identifies_content_and_no_trace():
    method = ContentOnly()
    plain = [image(seed).clamp(2, 253) for seed in range(4)]
    vectors = method.embed([drawn_sample(pixels) for pixels in plain])
    traced = method.embed([Sample(with_trace(pixels), "JPEG", 1) for pixels in plain])
    np.testing.assert_allclose(traced, vectors, atol=1e-6)
    others = vectors @ vectors.T - 2 * np.eye(4)
    assert others.max() < 0.99 and not method.looks_at_trace


def test_codec_and_size_sees_no_pixel():
    method = CodecAndSize()

    def vector(codec="PNG", num_bytes=1000, width=64, seed=0) -> np.ndarray:
        return method.embed([Sample(image(seed, width), codec, num_bytes)])[0]

    start = vector()
    assert np.array_equal(start, vector(seed=5)) and not method.looks_at_trace
    assert start @ start == pytest.approx(1, abs=1e-6)
    similar = [float(start @ vector(num_bytes=num_bytes)) for num_bytes in (1000, 1005, 1020)]
    assert similar == sorted(similar, reverse=True) and len(set(similar)) == 3
    assert max(start @ vector(codec="JPEG"), start @ vector(num_bytes=2100), start @ vector(width=90)) < 0.9


def test_backbone_features_are_those_of_the_encoder_and_score_by_the_nearest_reference():
    settings = BackboneFeatureSettings(backbone=BACKBONE, features=FeatureSettings(pooled=False, moment_levels=(1,)))
    method = BackboneFeatures(settings, STORAGE)
    samples = [drawn_sample(image(seed)) for seed in range(5)]
    vectors = method.embed(samples)
    preprocessing = method.encoder.preprocessing
    with torch.inference_mode():
        network = method.encoder.model.backbone
        pixels = torch.stack([preprocessing.resize_and_crop(sample.image) for sample in samples])
        levels = network.forward_intermediates(preprocessing.normalise(pixels, "cpu", torch.float32), norm=False)[1]
        deviation, mean = torch.std_mean(levels[1], dim=(2, 3), correction=0)
    expected = unit_or_zero(torch.cat([mean, deviation], dim=1).numpy())
    np.testing.assert_allclose(vectors, expected, atol=1e-4)
    scores = method.scores([vectors[:2], vectors[2:]], vectors)
    np.testing.assert_allclose(scores[:, 0], (vectors @ vectors[:2].T).max(axis=1))
    deeper = settings.model_copy(update={"features": FeatureSettings(pooled=False, moment_levels=(2,))})
    assert BackboneFeatures(deeper, STORAGE).digest != method.digest == BackboneFeatures(settings, STORAGE).digest


def test_a_model_under_a_degradation_is_a_class_of_its_own(pool):
    settings = DiscriminantSettings(degradations=("none", "jpeg-85"), images_per_model=3)
    found = list(pool_spectra(pool, SPECTRUM, settings, STORAGE))
    assert [rows.shape for rows in found] == [(3, 3 * 16 * 9)] * 10
    drawn = pool.samples("0002", STORAGE)[1]
    for row, pixels in ((found[4][1], drawn), (found[5][1], degrade(drawn, parse("jpeg-85")))):
        np.testing.assert_allclose(row, image_spectrum(pixels), atol=1e-5)


def test_a_fit_is_kept_in_its_folder_and_belongs_to_one_pool_and_config(pool, tmp_path):
    folder, settings = str(tmp_path), DiscriminantSettings()
    fitted = fitted_maps(pool, SPECTRUM, settings, STORAGE, folder)
    without_models = Pool(pool.uri, [], px=32, num_photographs=8, digest=pool.digest)
    again = fitted_maps(without_models, SPECTRUM, settings, STORAGE, folder)  # loaded: there is nothing to fit on
    assert list(again) == list(fitted) == [DISCRIMINANT, WHITENING]
    for name, found in fitted.items():
        assert np.array_equal(again[name].projection, found.projection)
    loaded = load_spectrum_method("spectrum-lda", folder, STORAGE)
    assert loaded.digest == SpectrumDiscriminant(fitted[DISCRIMINANT], SPECTRUM).digest and loaded.min_side_px == 16
    whitened = load_spectrum_method("spectrum-whitened", folder, STORAGE)
    assert whitened.digest == SpectrumWhitened(fitted[WHITENING], SPECTRUM).digest != loaded.digest
    plain = load_spectrum_method("log-spectrum", folder, STORAGE)
    assert plain.digest == LogSpectrum(fitted[DISCRIMINANT].mean, SPECTRUM).digest
    with pytest.raises(AttribError, match="holds spectrum-lda and log-spectrum, not colour-spectrum; correct"):
        load_spectrum_method("colour-spectrum", folder, STORAGE)
    with pytest.raises(AttribError, match="was fitted on another pool or with other options"):
        fitted_maps(pool, SPECTRUM, DiscriminantSettings(shrinkage=0.2), STORAGE, folder)


def test_all_methods_of_a_table_tell_models_apart_that_share_their_content(pool):
    settings = MethodsSettings(
        spectrum=SPECTRUM, colour_spectrum=COLOURS, backbone=BackboneFeatureSettings(backbone=BACKBONE)
    )
    methods = methods_from(settings, pool, STORAGE)
    names = [*COLOUR_NAMES, *NAMES, "backbone", "backbone-knn", "backbone-logistic"]
    leaks = ["content-only", "codec-and-size"]
    assert [method.name for method in methods] == names + leaks
    assert [method.name for method in methods if method.looks_at_trace] == names
    by_digest = {}
    for method in methods:
        by_digest.setdefault(method.digest, []).append(method.name)
    alike = [names[0:2], names[2:5], names[5:7], names[7:10], names[10:11], names[11:]]
    assert list(by_digest.values()) == [*alike, leaks[:1], leaks[1:]]
    assert all((method.registered_as is None) == (method.name in leaks) for method in methods)
    samples = [[drawn_sample(pixels) for pixels in pool.samples(model.model_id, STORAGE)] for model in pool.models]
    for method in methods:
        vectors = [method.embed(group) for group in samples]
        assert vectors[0].dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(np.concatenate(vectors), axis=1), 1, atol=1e-5)
        # Vectors do not depend on what else is embedded beside them.
        np.testing.assert_allclose(method.embed(samples[1][2:3])[0], vectors[1][2], atol=1e-6)
        scores = method.scores([rows[:4] for rows in vectors], np.concatenate([rows[4:] for rows in vectors]))
        assert scores.shape == (20, 5) and np.isfinite(scores).all()
        if method.looks_at_trace:
            assert (scores.argmax(axis=1) == np.repeat(range(5), 4)).mean() > 0.8, method.name


def test_the_trained_extractor_comes_first_and_a_backbone_is_optional(pool):
    network = FingerprintNetwork(NetworkSettings(patch_px=16, window_px=8, num_learned=8, width=8))
    extractor = Extractor(network)
    methods = methods_from(MethodsSettings(spectrum=SPECTRUM, colour_spectrum=COLOURS), pool, STORAGE, extractor)
    assert methods[0] is extractor and methods[1].digest == extractor.digest
    of_extractor = ["extractor", "extractor-cosine", "extractor-logistic"]
    of_extractor += ["extractor-untrained", "extractor-untrained-cosine", "extractor-untrained-logistic"]
    of_extractor += ["part-colour-spectrum", "part-polyphase", "part-learned"]
    leaks = ["content-only", "codec-and-size"]
    assert [method.name for method in methods] == [*of_extractor, *COLOUR_NAMES, *NAMES, *leaks]
    assert len({method.digest for method in methods[:6]}) == 2 and len({method.digest for method in methods[:9]}) == 5
    assert methods[5].registered_as == "name: extractor-untrained, scoring: logistic"


def test_colour_spectra_are_windows_of_each_patch():
    pixels = image(3)
    expected = colour_spectrum(residual(patches(pixels, 16, 4).float() / 255), 8).mean(dim=0).numpy().ravel()
    assert COLOURS.dimension == len(expected) == 2 * 6 * 8 * 5
    np.testing.assert_allclose(spectra([drawn_sample(pixels)], COLOURS)[0], expected)
    small = SpectrumSettings(patch_px=32, window_px=8)
    mixed = [drawn_sample(image(0, 64, 48)), drawn_sample(image(1, 40, 20)), drawn_sample(image(2, 64, 48))]
    one_patch = colour_spectrum(residual(patches(mixed[1].image, 20, 16).float() / 255), 8).mean(dim=0).numpy().ravel()
    found = spectra(mixed, small)
    np.testing.assert_allclose(found[1], one_patch, atol=1e-5)
    np.testing.assert_allclose(found[2], spectra(mixed[2:], small)[0], atol=1e-5)
    assert small.min_side_px == 16
    with pytest.raises(AttribError, match="needs 16"):
        spectra([drawn_sample(image(0, 15, 40))], small)
    with pytest.raises(ValidationError, match="window_px 32 exceeds patch_px 16"):
        SpectrumSettings(patch_px=16, window_px=32)
