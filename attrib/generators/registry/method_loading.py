"""The fingerprint method of a registry, from where its settings say it lies."""

from attrib.common.storage import Storage
from attrib.generators.extractor.network import load_extractor, untrained
from attrib.generators.fingerprints.backbone import BackboneFeatures
from attrib.generators.fingerprints.base import Method, asked
from attrib.generators.fingerprints.spectrum import load_spectrum_method
from attrib.generators.registry.settings import RegistryMethodSettings


def load_method(settings: RegistryMethodSettings, storage: Storage, device: str = "cpu") -> Method:
    """Raises AttribError if it is not there or no longer understood. device: "cpu" or "cuda", for networks."""
    method = _method(settings, storage, device)
    return asked(method, settings.scoring or method.scoring)


def _method(settings: RegistryMethodSettings, storage: Storage, device: str) -> Method:
    if settings.name == "backbone":
        return BackboneFeatures(settings.backbone, storage, device)
    if settings.name in ("extractor", "extractor-untrained"):
        extractor = load_extractor(settings.uri, storage, device)
        return extractor if settings.name == "extractor" else untrained(extractor)
    return load_spectrum_method(settings.name, settings.uri, storage)
