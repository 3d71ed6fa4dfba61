"""Options of the fingerprint methods other than the trained extractor."""

from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field, model_validator

from attrib.common.settings import Positive, Settings
from attrib.models.settings import BackboneSettings, FeatureSettings

ScoringName = Literal["cosine", "nearest", "adapted", "knn", "logistic"]  # attrib/generators/fingerprints/scoring.py
# Part of the digest of every method. Raise it whenever the same settings and weights give other vectors or scores, so
# that stored references are never compared with incompatible queries.
FINGERPRINT_VERSION = 3
# Degradations of the evaluation. They are parsed in attrib/generators/signals/degradations.py, which imports torch.
GRID_NAMES = ("none", "jpeg-95", "jpeg-85", "jpeg-70", "jpeg-50", "webp-85", "webp-60", "resize-0.75", "resize-0.5")
GRID_NAMES += ("blur-0.5", "blur-1", "crop-0.8")
PERIOD_PX = 8  # period of upsampling artefacts and JPEG blocks (attrib/generators/signals/spectrum.py)
Shrinkage = Literal["ledoit_wolf"] | Annotated[float, Field(gt=0, le=1)]
Value = TypeVar("Value")


def _check_distinct(values: tuple[Value, ...]) -> tuple[Value, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"contains a value twice: {list(values)}; give each value once")
    return values


Distinct = Annotated[tuple[Value, ...], Field(min_length=1), AfterValidator(_check_distinct)]  # one value or more


class SpectrumSettings(Settings):
    """Patches of an image over which its spectrum is averaged."""

    patch_px: int = Field(default=32, ge=8, multiple_of=2)
    max_patches: Positive = 16
    # None: log spectrum of each channel of a whole patch. Else colour spectrum of windows of this size
    # (attrib/generators/signals/spectrum.py).
    window_px: Annotated[int, Field(ge=4, multiple_of=2)] | None = None

    @model_validator(mode="after")
    def _window_fits(self):
        if self.window_px and self.window_px > self.patch_px:
            raise ValueError(f"window_px {self.window_px} exceeds patch_px {self.patch_px}; lower window_px")
        return self

    @property
    def min_side_px(self) -> int:
        """Shorter side of the smallest image that can be assessed: one patch, or two windows if there are windows."""
        return min(self.patch_px, 2 * self.window_px) if self.window_px else self.patch_px

    def patch_side(self, side_px: int) -> int:
        """Side in pixels of the patches of an image with this shorter side."""
        return max(self.min_side_px, min(self.patch_px, side_px))

    @property
    def dimension(self) -> int:
        """Number of values of a spectrum."""
        side = self.window_px or self.patch_px
        return (12 if self.window_px else 3) * side * (side // 2 + 1)


class DiscriminantSettings(Settings):
    """Linear discriminant of spectra, fitted on the synthetic models (attrib/generators/fingerprints/discriminant.py).

    shrinkage: of the covariance within models, towards a multiple of the identity. The Ledoit-Wolf estimate (0.003 on
    our pool) is best for new images of the same models. For unseen upsamplers and JPEG images, a much larger value is
    better.
    """

    shrinkage: Shrinkage = 0.5  # of the discriminant
    whitening_shrinkage: float = Field(default=0.8, gt=0, le=1)
    num_directions: Positive | None = None  # of largest variance between models; None: all, the number of classes - 1
    # Applied to the models' images. Images of one model under one degradation are one class.
    degradations: Distinct[str] = ("none", "jpeg-85")
    images_per_model: Positive | None = 64  # the first of each model; None: all


class BackboneFeatureSettings(Settings):
    """Features of a frozen timm network with its own preprocessing.

    Early and intermediate levels keep generator artefacts, the last levels keep the content. So the most important
    option is `features.moment_levels`.
    """

    backbone: BackboneSettings
    features: FeatureSettings = FeatureSettings(pooled=False, moment_levels=(1,))


class MethodsSettings(Settings):
    """All methods that are compared, except the trained extractor, which has its own job."""

    spectrum: SpectrumSettings = SpectrumSettings()
    colour_spectrum: SpectrumSettings = SpectrumSettings(
        window_px=8
    )  # also the first of the extractor's two statistics
    discriminant: DiscriminantSettings = DiscriminantSettings()
    colour_discriminant: DiscriminantSettings = DiscriminantSettings(shrinkage=0.15)
    backbone: BackboneFeatureSettings | None = None  # None: no backbone methods
