"""The fingerprint method of a registry, from where its settings say it lies."""

from attrib.generators.backbone_features import BackboneFeatures
from attrib.generators.discriminant import load_discriminant
from attrib.generators.extractor import load_extractor
from attrib.generators.fingerprint_settings import SpectrumSettings
from attrib.generators.methods import Method
from attrib.generators.registry_settings import RegistryMethodSettings
from attrib.generators.spectrum_methods import DISCRIMINANT, LogSpectrum, load_spectrum_discriminant
from attrib.storage import Storage, join


def load_method(settings: RegistryMethodSettings, storage: Storage, device: str = "cpu") -> Method:
    """Raises AttribError if it is not there or no longer understood. device: "cpu" or "cuda", for networks."""
    if settings.name == "extractor":
        return load_extractor(settings.uri, storage, device)
    if settings.name == "spectrum-lda":
        return load_spectrum_discriminant(settings.uri, storage)
    if settings.name == "log-spectrum":
        discriminant, held = load_discriminant(join(settings.uri, DISCRIMINANT), storage)
        return LogSpectrum(discriminant.mean, SpectrumSettings.model_validate(held["spectrum"]))
    return BackboneFeatures(settings.backbone, storage, device)
