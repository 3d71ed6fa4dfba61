"""Load the fingerprint method of a registry."""

from attrib.common.storage import Storage
from attrib.generators.extractor.network import load_extractor, untrained
from attrib.generators.fingerprints.base import Method, with_scoring
from attrib.generators.fingerprints.spectrum import load_spectrum_method
from attrib.generators.registry.settings import RegistryMethodSettings


def load_method(settings: RegistryMethodSettings, storage: Storage, device: str = "cpu") -> Method:
    """The method that the settings describe. Raises AttribError if it is missing or outdated. device: cpu or cuda."""
    if settings.name == "backbone":
        from attrib.generators.fingerprints.backbone import BackboneFeatures  # timm, which takes seconds to import

        method: Method = BackboneFeatures(settings.backbone, storage, device)
    elif settings.name in ("extractor", "extractor-untrained"):
        extractor = load_extractor(settings.uri, storage, device)
        method = extractor if settings.name == "extractor" else untrained(extractor)
    else:
        method = load_spectrum_method(settings.name, settings.uri, storage)
    return with_scoring(method, settings.scoring)
