"""Load the fingerprint method of a registry."""

from attrib.common.storage import Storage
from attrib.generators.extractor.network import load_extractor, untrained
from attrib.generators.fingerprints.backbone import BackboneFeatures
from attrib.generators.fingerprints.base import Method, asked
from attrib.generators.fingerprints.spectrum import load_spectrum_method
from attrib.generators.registry.settings import RegistryMethodSettings


def load_method(settings: RegistryMethodSettings, storage: Storage, device: str = "cpu") -> Method:
    """The method that the settings describe. Raises AttribError if it is missing or outdated. device: cpu or cuda."""
    method = _method(settings, storage, device)
    return asked(method, settings.scoring or method.scoring)


def _method(settings: RegistryMethodSettings, storage: Storage, device: str) -> Method:
    if settings.name == "backbone":
        return BackboneFeatures(settings.backbone, storage, device)
    if settings.name in ("extractor", "extractor-untrained"):
        extractor = load_extractor(settings.uri, storage, device)
        return extractor if settings.name == "extractor" else untrained(extractor)
    return load_spectrum_method(settings.name, settings.uri, storage)
