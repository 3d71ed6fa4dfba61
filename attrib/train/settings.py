"""Options of jobs.train: views, objective, optimiser, fine-tuning and controls."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from attrib.common.settings import JobSettings, Positive, Settings, Share, Uri
from attrib.data.settings import TableSettings
from attrib.models.settings import BackboneSettings, FeatureSettings, HeadSettings
from attrib.train.augment.settings import ViewSettings, Weight


class AlignmentSettings(Settings):
    """Contrastive loss between a view and its sources (attrib/train/losses/contrastive.py)."""

    kind: Literal["info_nce", "moco"] = "info_nce"
    temperature: float = Field(default=0.02, gt=0)
    style_weight: Weight = 1.0  # of the style donor's loss; the content's has weight 1
    momentum: float = Field(default=0.99, ge=0, lt=1)  # moco: share of the momentum encoder kept in a step
    queue_rows: Positive = 4096  # moco


class DisentanglementSettings(Settings):
    """Loss that decorrelates the dimensions of the embedding (attrib/train/losses/decorrelation.py)."""

    kind: Literal["none", "gaussian_infomax", "cor_infomax", "cca_ssg"] = "gaussian_infomax"
    weight: Weight = 5.0
    eps: float = Field(default=0.1, gt=0)  # of the log-det terms


class OptimiserSettings(Settings):
    num_epochs: Positive = 8
    batch_size: Positive = 256  # views of the global batch, over all workers
    learning_rate: float = Field(default=5e-4, gt=0)
    weight_decay: Weight = 0.0
    warmup_share: Share = 0.1  # of all steps; then half a cosine to zero
    patience_epochs: Positive = 3  # epochs without a better criterion before training stops
    validation_share: float = Field(default=0.1, gt=0, lt=1)  # of the sources, whose views only validate


class FineTuneSettings(Settings):
    """End-to-end training: pixels through the network at every step. Batch norm stays frozen, so that workers agree."""

    num_blocks: Positive | Literal["all"] = 2  # number of last blocks of the backbone to train
    learning_rate: float = Field(default=2e-5, gt=0)  # of the backbone; the head uses the optimiser's
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on GPUs
    num_loaders: int = Field(default=0, ge=0)  # processes per worker that render views; 0: the worker renders


class TrainSettings(JobSettings):
    """jobs.train: a model from source images only, or a control."""

    execution_only: ClassVar[frozenset[str]] = JobSettings.execution_only | {"num_workers", "device", "synthetic"}

    manifest: Uri  # of the sources
    output: Uri
    backbone: BackboneSettings
    features: FeatureSettings = FeatureSettings()
    head: HeadSettings = HeadSettings()
    views: ViewSettings = ViewSettings()
    views_per_image: Positive = 10  # computed once; fine-tuning draws new views in every epoch instead
    max_images: Positive = 100_000  # a random sample of a larger collection
    alignment: AlignmentSettings = AlignmentSettings()
    disentanglement: DisentanglementSettings = DisentanglementSettings()
    optimiser: OptimiserSettings = OptimiserSettings()
    fine_tune: FineTuneSettings | None = None  # None: only the head, on features computed once
    synthetic: Uri | None = None  # manifest of unpaired generated images, to fit the head of their domain
    pairs: TableSettings | None = None  # for control supervised: key_column names the synthetic image
    pairs_source_column: str = "source"
    control: Literal["raw", "centred", "whitened", "domain_whitened", "supervised"] | None = None
    max_failed_share: Share = 0.05
    chunk_rows: Positive = 64  # images per chunk of features
    num_workers: Positive = 1  # of Ray Train
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0

    @model_validator(mode="after")
    def _consistent(self):
        self.head.check(self.features)
        if self.control and self.fine_tune:
            raise ValueError("a control has nothing to fine-tune; remove control or fine_tune")
        if self.control in ("domain_whitened", "supervised") and not self.synthetic:
            raise ValueError(f"control {self.control!r} needs `synthetic`, the manifest of the generated images")
        if self.control == "supervised" and not self.pairs:
            raise ValueError("control 'supervised' needs `pairs`, a table of synthetic images and their sources")
        disentangles = self.disentanglement.kind != "none" and self.disentanglement.weight > 0
        if self.head.separate_domains and self.alignment.kind != "info_nce" and not disentangles:
            # The momentum encoder alone encodes the sources, so no gradient would reach the head for real images.
            raise ValueError(
                f"with head.separate_domains, alignment.kind {self.alignment.kind!r} leaves the head for real images "
                "untrained; use info_nce, or a disentanglement.kind with a weight above 0"
            )
        size, queue_rows = self.optimiser.batch_size, self.alignment.queue_rows
        num_keys = size if self.fine_tune else 2 * size  # see attrib/train/batches.py: contents and donors
        if self.alignment.kind == "moco" and queue_rows < num_keys:
            raise ValueError(f"alignment.queue_rows {queue_rows} must be at least {num_keys}, the keys of each step")
        if self.head.net != "none" and self.control in (None, "supervised") and size % self.num_workers:
            raise ValueError(f"optimiser.batch_size {size} must be a multiple of num_workers ({self.num_workers})")
        return self

    @property
    def num_views(self) -> int:
        """Views per image whose features are computed once: none for controls and end-to-end training."""
        trains_head = self.head.net != "none" and self.fine_tune is None and self.control is None
        return self.views_per_image if trains_head else 0
