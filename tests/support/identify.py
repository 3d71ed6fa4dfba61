"""Helpers of the tests of jobs.identify: a registry of two drawn generators and photographs, and settings of a run."""

from collections.abc import Sequence

from attrib.common.storage import join
from attrib.generators.identify.settings import IdentifySettings
from attrib.generators.registry.registration import as_sources
from attrib.generators.registry.registry import Registry, new_registry, register
from attrib.generators.registry.settings import RegistryMethodSettings
from support.generators import STORAGE, drawn_samples, spectrum_method, write_spectrum_method

TRACES = ("nearest", "checker")


def registered(root: str) -> str:
    """URI of a registry with as many negatives (background cohort) of each kind as a rate of 0.05 needs."""
    write_spectrum_method(join(root, "method"), STORAGE)
    return drawn_registry(root, TRACES, 25, 50).uri


def drawn_registry(root: str, traces: Sequence[str], num_references: int, num_photographs: int) -> Registry:
    """A registry of drawn generators, each with num_references images, and of photographs."""
    method, made_by = spectrum_method(), RegistryMethodSettings(name="log-spectrum", uri=join(root, "method"))
    held = new_registry(join(root, "registry"), made_by, method, ("none", "jpeg-85"), STORAGE)
    for trace in traces:
        held, _ = register(held, trace, "generator", [drawn_samples(trace, range(num_references))], method, STORAGE)
    photographs = as_sources(drawn_samples(None, range(num_photographs)), "photographs")
    return register(held, "camera", "photographs", photographs, method, STORAGE)[0]


def settings_of(made: dict, registry: str, output: str, **options) -> IdentifySettings:
    given = {
        "manifest": made["manifest"],
        "registry": registry,
        "output": output,
        "max_failed_share": 0.5,
        "chunk_rows": 25,
        "max_megapixels": 10,
        "prevalence": {"num_draws": 100, "set_column": "account", "num_permutations": 99, "min_candidate_images": 10},
    }
    return IdentifySettings(**given | options)
