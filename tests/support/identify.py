"""Helpers of the tests of jobs.identify: a registry of two drawn generators and photographs, and settings of a run."""

from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage, join
from attrib.generators.identify.settings import IdentifySettings
from attrib.generators.registry.registration import as_sources
from attrib.generators.registry.registry import new_registry, register
from attrib.generators.registry.settings import RegistryMethodSettings
from support.generators import drawn_samples, spectrum_method, write_spectrum_method

STORAGE = Storage(StorageSettings())
TRACES = ("nearest", "checker")


def registered(root: str) -> str:
    """URI of a registry with as many negatives (background cohort) of each kind as a rate of 0.05 needs."""
    write_spectrum_method(join(root, "method"), STORAGE)
    method = spectrum_method()
    made_by = RegistryMethodSettings(name="log-spectrum", uri=join(root, "method"))
    held = new_registry(join(root, "registry"), made_by, method, ("none", "jpeg-85"), STORAGE)
    for trace in TRACES:
        held, _ = register(held, trace, "generator", [drawn_samples(trace, range(25))], method, STORAGE)
    photographs = as_sources(drawn_samples(None, range(50)), "photographs")
    register(held, "camera", "photographs", photographs, method, STORAGE)
    return held.uri


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
