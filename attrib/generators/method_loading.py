"""The fingerprint method of a registry, from where its settings say it lies."""

from attrib.generators.backbone_features import BackboneFeatures
from attrib.generators.extractor import load_extractor, untrained
from attrib.generators.methods import Method, asked
from attrib.generators.registry_settings import RegistryMethodSettings
from attrib.generators.spectrum_methods import load_spectrum_method
from attrib.storage import Storage


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
