"""Options of jobs.demo."""

from pydantic import Field, model_validator

from attrib.common.settings import JobSettings, Positive, Uri


class DemoSettings(JobSettings):
    """jobs.demo: the whole flow on drawn images, with generators that are fitted to known exemplars among them."""

    output: Uri = Field(default="runs/demo", validate_default=True)
    num_sources: int = Field(default=1000, ge=100)
    num_exemplars: Positive = 32
    samples_per_exemplar: Positive = 6
    num_epochs: Positive = 30  # of jobs.train, at most
    seed: int = 0

    @model_validator(mode="after")
    def _possible(self):
        if self.output.startswith("s3://"):
            raise ValueError("the demo draws to a local folder; give output a local path")
        if self.num_exemplars > self.num_sources:
            raise ValueError(f"{self.num_exemplars} exemplars cannot be chosen from {self.num_sources} sources")
        return self
