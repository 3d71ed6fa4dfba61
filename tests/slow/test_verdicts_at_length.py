"""Verdicts on heavily degraded images with the default grid of degradations."""

from support.generators import drawn_samples, spectrum_method

from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage
from attrib.generators.identify.verdicts import assess, judge_of
from attrib.generators.registry.registration import as_sources
from attrib.generators.registry.registry import new_registry, register
from attrib.generators.registry.settings import RegistryMethodSettings, RegistrySettings, VerdictSettings
from attrib.generators.signals.degradations import parse
from attrib.generators.signals.samples import recoded

STORAGE = Storage(StorageSettings())


def test_heavily_degraded_images_are_unassessable_not_unknown(tmp_path):
    method, grid = spectrum_method(), RegistrySettings.model_fields["degradations"].default
    made_by = RegistryMethodSettings(name="log-spectrum", uri="m")
    held = new_registry(str(tmp_path / "r"), made_by, method, grid, STORAGE)
    for trace in ("nearest", "stripes", "checker"):
        held, _ = register(held, trace, "generator", [drawn_samples(trace, range(20))], method, STORAGE)
    photographs = as_sources(drawn_samples(None, range(60)), "photographs")
    held, _ = register(held, "camera", "photographs", photographs, method, STORAGE)
    fine = judge_of(held, method, VerdictSettings(), STORAGE)
    samples = drawn_samples("nearest", range(300, 320))
    for name in ("jpeg-10", "webp-40", "resize-0.5", "blur-1"):
        verdicts, _ = assess([recoded(sample, parse(name)) for sample in samples], fine)
        assert sum(v.kind == "unknown" for v in verdicts) <= 2, name
    assert sum(v.generator == "nearest" for v in assess(samples, fine)[0]) >= 18
