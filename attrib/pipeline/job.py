"""jobs.pipeline: all stages in one process and one Ray session. A stage that is finished is not run again."""

from attrib.attribute import job as attribute_job
from attrib.attribute.report import write_report
from attrib.common.outputs import check_output
from attrib.common.run_record import STARTED, FinishedRecord
from attrib.common.storage import Storage, join
from attrib.data import job as manifest_job
from attrib.data.manifest import MANIFEST_RECORD, open_manifest
from attrib.embed import job as embed_job
from attrib.embed.embeddings import FAILURES
from attrib.generators.identify import job as identify_job
from attrib.generators.identify.summary import check_set_column
from attrib.index import job as index_job
from attrib.pipeline.checks import check_pipeline
from attrib.pipeline.settings import PipelineSettings

# A run begins with them, so an output that has one is that of an earlier run.
OWN_FILES = tuple(f"{role}/manifest/{name}" for role in ("sources", "generated") for name in (STARTED, MANIFEST_RECORD))


def run(settings: PipelineSettings) -> dict:
    """Run every stage. Returns a summary: numbers of images, and where the results are.

    Raises AttribError before the first image is read if an input or the output cannot be used, or if a collection
    changed since an earlier run.
    """
    stages, roles, storage = settings.stages(), ("sources", "generated"), Storage(settings.storage)
    check_output(settings, OWN_FILES, storage)
    check_pipeline(settings, storage)
    # Images that failed may have been repaired in their place.
    repaired = stages["sources/embeddings"].retry_failed
    records = [manifest_job.run(stages[f"{role}/manifest"], ignore_versions=repaired) for role in roles]
    if "generators" in stages:
        check_set_column(stages["generators"], open_manifest(stages["generators"].manifest, storage))
    records += (embedded := [embed_job.run(stages[f"{role}/embeddings"]) for role in roles])
    records += [built := index_job.run(stages["index"])]
    if "generators" in stages:
        records += [identify_job.run(stages["generators"])]
    records += [attributed := attribute_job.run(stages["attributions"])]
    write_report(stages["report"])
    summary = {}
    if num_failed := embedded[0]["num_failed"]:
        table = join(stages["sources/embeddings"].output, FAILURES)
        summary["sources"] = (
            f"{embedded[0]['num_images']:,} listed, {num_failed:,} could not be read and cannot be found ({table})"
        )
    summary |= {
        "sources indexed": f"{built['num_vectors']:,}",
        "generated images": f"{attributed['num_queries']:,} ({attributed['num_failed']:,} failed)",
        "attributions (Parquet)": join(settings.output, "attributions", "attributions"),
        "outcomes (Parquet)": join(settings.output, "attributions", "outcomes"),
        "page": stages["report"].output,
    }
    if all(isinstance(record, FinishedRecord) for record in records):
        collections = f"{settings.sources.uri} and {settings.generated.uri}"
        summary["nothing was computed"] = f"finished before, at {attributed['written_at']}, from {collections}"
    return summary
