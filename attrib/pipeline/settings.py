"""Options of jobs.pipeline: one section per stage."""

from typing import ClassVar

from pydantic import Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from attrib.attribute.settings import AttributeSettings, ReportSettings
from attrib.common.settings import JobSettings, RescanSettings, Share, Uri
from attrib.data.settings import CollectionSettings, ManifestSettings
from attrib.embed.settings import EmbedSettings
from attrib.generators.identify.settings import IdentifySettings
from attrib.index.settings import IndexSettings
from attrib.models.settings import BackboneSettings


class PipelineSettings(RescanSettings):
    """jobs.pipeline: one section of options per stage; the pipeline fills in their inputs and outputs."""

    sources: CollectionSettings
    generated: CollectionSettings
    output: Uri
    max_failed_share: Share = 0.05  # of the embed and attribute stages
    backbone: BackboneSettings
    manifest: dict = Field(default_factory=dict)
    embed: dict = Field(default_factory=dict)
    index: dict = Field(default_factory=dict)
    attribute: dict = Field(default_factory=dict)
    report: dict = Field(default_factory=dict)
    identify: dict | None = None  # attribution to registered generators; None: skipped
    sections: ClassVar[dict[str, type[JobSettings]]] = {
        "manifest": ManifestSettings,
        "embed": EmbedSettings,
        "index": IndexSettings,
        "attribute": AttributeSettings,
        "report": ReportSettings,
        "identify": IdentifySettings,
    }

    def stages(self) -> dict[str, JobSettings]:
        """Validated settings of every stage, by name."""
        made: dict[str, JobSettings] = {}
        for role, collection in (("sources", self.sources), ("generated", self.generated)):
            manifest, vectors = f"{self.output}/{role}/manifest", f"{self.output}/{role}/embeddings"
            made[f"{role}/manifest"] = self._stage("manifest", collection=collection, output=manifest)
            backbone = self.backbone.model_copy(update={"domain": "real" if role == "sources" else "synthetic"})
            made[f"{role}/embeddings"] = self._stage("embed", manifest=manifest, output=vectors, backbone=backbone)
        sources, generated, index, attributions = (
            f"{self.output}/{name}" for name in ("sources/embeddings", "generated/embeddings", "index", "attributions")
        )
        made["index"] = self._stage("index", embeddings=sources, output=index)
        identified = {}
        if self.identify is not None:
            made["generators"] = self._stage(
                "identify", manifest=f"{self.output}/generated/manifest", output=f"{self.output}/generators"
            )
            identified = {"generators": made["generators"].output}
        made["attributions"] = self._stage(
            "attribute", queries=generated, index=index, output=attributions, **identified
        )
        made["report"] = self._stage("report", attributions=attributions, output=f"{self.output}/report.html")
        return made

    def _stage(self, section: str, **filled_in) -> JobSettings:
        kind, given = self.sections[section], getattr(self, section)
        names = {"storage", "ray", "budget", "max_failed_share"} & kind.model_fields.keys()
        common = {name: getattr(self, name) for name in names}
        if issubclass(kind, RescanSettings):
            filled_in["rescan"] = self.rescan
        for key in filled_in.keys() & given.keys():
            raise ValueError(f"{section}.{key} is filled in by the pipeline; leave it out")
        try:
            return kind.model_validate(common | given | filled_in)
        except ValidationError as error:
            # Put the section in front of the key; the error would else seem to be about a key of the pipeline itself.
            found = [
                InitErrorDetails(
                    type=PydanticCustomError(e["type"], e["msg"]),  # type: ignore[arg-type]
                    loc=(section, *e["loc"]),
                    input=e["input"],
                )
                for e in error.errors()
            ]
            raise ValidationError.from_exception_data(kind.__name__, found) from None

    @model_validator(mode="after")
    def _stages_valid(self):
        if self.sources.name == self.generated.name:
            raise ValueError(
                f"sources and generated share the name {self.sources.name!r}; give each its own, as ids depend on it"
            )
        self.stages()
        return self
