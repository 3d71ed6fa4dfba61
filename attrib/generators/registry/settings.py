"""Options of jobs.registry, and the verdict options of jobs.identify."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from attrib.common.settings import JobSettings, Positive, Settings, Share, Uri
from attrib.data.settings import CollectionSettings
from attrib.generators.settings import BackboneFeatureSettings, ScoringName

MIN_REFERENCES = 10
SpectrumName = Literal["log-spectrum", "spectrum-lda", "spectrum-whitened"]
SpectrumName |= Literal["colour-spectrum", "colour-spectrum-lda"]
Name = Annotated[str, Field(min_length=1, max_length=80, pattern=r"^[A-Za-z0-9._-]+$")]
Rate = Annotated[float, Field(gt=0, lt=1)]
# "generator": images are attributed to it. All other roles are negatives, to which nothing is attributed: photographs,
# generators that did not make the images to identify, and the synthetic models of a pool.
Role = Literal["generator", "photographs", "other-generator", "synthetic"]


class RegistryMethodSettings(Settings):
    """The fingerprint method of a registry. Leak controls cannot be chosen."""

    name: Literal["extractor", "extractor-untrained", "backbone"] | SpectrumName = "extractor"
    scoring: ScoringName | None = None  # of a query by the references; None: the method's own
    uri: Uri | None = None  # output of jobs.fingerprint; for the spectrum methods the folder with lda.safetensors
    backbone: BackboneFeatureSettings | None = None  # for name: backbone

    @model_validator(mode="after")
    def _complete(self):
        wanted = "backbone" if self.name == "backbone" else "uri"
        if getattr(self, wanted) is None:
            raise ValueError(f"method {self.name!r} needs {wanted}")
        return self


class RegistrySettings(JobSettings):
    """jobs.registry: register, list or remove a generator, or images that serve as negatives."""

    execution_only: ClassVar[frozenset[str]] = JobSettings.execution_only | {"device"}

    action: Literal["register", "list", "remove"]
    registry: Uri
    method: RegistryMethodSettings | None = None  # needed for a new registry; for an existing one the same, or None
    # For a new registry. References are kept under each of these degradations, so that a degraded query is compared
    # with references that were degraded in the same way. The last four leave almost no trace: images that resemble
    # those references are unassessable and not unknown. More degradations need more negatives.
    degradations: tuple[str, ...] = (
        *("none", "jpeg-85", "jpeg-70", "webp-85", "resize-0.75"),
        *("jpeg-20", "webp-50", "resize-0.5", "blur-1"),
    )
    name: Name | None = None  # of the entry
    role: Role = "generator"
    images: CollectionSettings | None = None
    pool: Uri | None = None  # for role: synthetic, in place of images; output of jobs.synthesize
    images_per_model: Positive = 4  # of the pool
    max_images: Annotated[int, Field(ge=MIN_REFERENCES)] = 100  # of a larger collection, an evenly spaced part is used
    new_version: bool = False  # true: replace the references of an existing name; the old ones are kept, but not used
    version: Positive | None = None  # to remove; None: all versions
    max_megapixels: float = Field(default=100.0, gt=0)
    device: Literal["cpu", "cuda"] = "cpu"

    @field_validator("degradations")
    @classmethod
    def _untouched_first(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names or names[0] != "none" or len(set(names)) < len(names):
            raise ValueError(f"degradations must start with 'none' and have no duplicates, got {list(names)}")
        return names

    @model_validator(mode="after")
    def _complete(self):
        if self.action != "list" and self.name is None:
            raise ValueError(f"action {self.action!r} needs the name of an entry")
        if self.action == "register":
            if (self.images is None) == (self.pool is None):
                raise ValueError("action 'register' needs exactly one of images and pool; set the other to null")
            if (self.pool is None) == (self.role == "synthetic"):
                raise ValueError("role 'synthetic' needs pool, and pool needs role 'synthetic'")
        return self


class VerdictSettings(Settings):
    """When an image is attributed to a generator, and when it is unassessable."""

    # At most this share of photographs, and of images of unregistered generators, is attributed, if they are drawn from
    # the same distribution as the negatives of their origin (see unit). Nothing is attributed if the rate is below the
    # smallest possible p-value, or without generated negatives. The rate does not hold for a generator that is unlike
    # all negatives; for comparison, the report has the rate of each registered generator when it is left out.
    false_attribution_rate: Rate = 0.05
    # At most about this share of a generator's own images is rejected; with fewer than 1 / rate - 1 references none is.
    false_rejection_rate: Rate = 0.05
    # An image that is not attributed is unknown if at least this share of the references in its gallery is recognised.
    # Otherwise, for example under heavy compression, it is unassessable.
    least_recognised: Share = 0.5
    # What false_attribution_rate holds for. image: for an image drawn from the same distribution as the negatives of
    # its origin; images of one source are dependent, so the rate of a new source may be higher. source: for the first
    # image of a new source, drawn like the sources of the generated negatives (mostly synthetic models); 1 / rate
    # sources or more are needed. Each photograph is a source.
    unit: Literal["image", "source"] = "image"
    # Two generators are distinct if more than this share of their references has a higher leave-one-out score for its
    # own generator, by a binomial test at family_level. Generators that are not distinct, directly or through others,
    # are one family.
    family_accuracy: float = Field(default=0.6, ge=0.5, lt=1)
    family_level: Rate = 0.05
    min_side_px: Positive = 1  # the fingerprint method's own limit holds in any case
    # Mean difference of neighbouring pixels, of 255; an image below it is blank.
    min_detail_levels: float = Field(default=0.25, ge=0)
