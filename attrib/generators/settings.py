"""Options of the fingerprint methods beside the trained extractor: what each looks at, and how its references are scored."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from attrib.common.settings import Positive, Settings
from attrib.models.settings import BackboneSettings, FeatureSettings

ScoringName = Literal["cosine", "nearest", "adapted", "knn", "logistic"]  # attrib/generators/fingerprints/scoring.py
# Part of every digest of a method: to be raised with each change of how vectors or scores come from the same settings and weights, so that
# old references never meet new queries.
FINGERPRINT_VERSION = 3
PERIOD_PX = (
    8  # of the lattice on which a decoder's doublings and JPEG's blocks repeat (attrib/generators/signals/spectrum.py)
)
Shrinkage = Literal["ledoit_wolf"] | Annotated[float, Field(gt=0, le=1)]


class SpectrumSettings(Settings):
    """Which patches of an image its spectrum is the mean of."""

    patch_px: int = Field(default=32, ge=8, multiple_of=2)
    max_patches: Positive = 16
    # None: the log spectrum of each channel of a whole patch. Else the colour spectrum (attrib/generators/signals/spectrum.py) of windows of this size.
    window_px: Annotated[int, Field(ge=4, multiple_of=2)] | None = None

    @model_validator(mode="after")
    def _window_fits(self):
        if self.window_px and self.window_px > self.patch_px:
            raise ValueError(f"window_px {self.window_px} exceeds patch_px {self.patch_px}; windows lie within a patch")
        return self

    @property
    def min_side_px(self) -> int:
        """Of images that can be assessed: a patch, or two windows, whose number a spectrum does not depend on."""
        return min(self.patch_px, 2 * self.window_px) if self.window_px else self.patch_px

    def patch_side(self, side_px: int) -> int:
        """Of the patches of an image with this shorter side."""
        return max(self.min_side_px, min(self.patch_px, side_px))

    @property
    def dimension(self) -> int:
        """Numbers of a spectrum."""
        side = self.window_px or self.patch_px
        return (12 if self.window_px else 3) * side * (side // 2 + 1)


class DiscriminantSettings(Settings):
    """Linear maps of spectra, fitted on the synthetic models (attrib/generators/fingerprints/discriminant.py).

    shrinkage: of the covariance within models, towards a multiple of the identity. Ledoit and Wolf's estimate (0.003 here) suits more
    images of the same models; on families of upsamplers that were left out of the fit, and under JPEG, much more shrinkage is better.
    """

    shrinkage: Shrinkage = 0.5  # of the discriminant
    whitening_shrinkage: float = Field(default=0.8, gt=0, le=1)
    num_directions: Positive | None = None  # of largest variance between models; None: all, one less than the classes
    # Of the models' images. A model's images that were degraded alike are one class, as they are for the extractor.
    degradations: tuple[str, ...] = Field(default=("none", "jpeg-85"), min_length=1)
    images_per_model: Positive | None = 64  # the first of each model; None: all

    @field_validator("degradations")
    @classmethod
    def _distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError(f"degradations names one twice: {list(names)}")
        return names


class BackboneFeatureSettings(Settings):
    """Features of a frozen timm network, as the network's own preprocessing shows it the image.

    Early and intermediate levels keep what a generator leaves behind and the last ones what is shown, so the levels are the option that
    counts: `features.moment_levels`.
    """

    backbone: BackboneSettings
    features: FeatureSettings = FeatureSettings(pooled=False, moment_levels=(1,))


class MethodsSettings(Settings):
    """All methods that are compared, except the trained extractor, which has its own job."""

    spectrum: SpectrumSettings = SpectrumSettings()
    colour_spectrum: SpectrumSettings = SpectrumSettings(window_px=8)  # the first of the extractor's two statistics
    discriminant: DiscriminantSettings = DiscriminantSettings()
    colour_discriminant: DiscriminantSettings = DiscriminantSettings(shrinkage=0.15)
    backbone: BackboneFeatureSettings | None = None  # None: these three rows are left out
