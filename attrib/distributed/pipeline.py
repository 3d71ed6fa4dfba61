"""All stages in one process and one Ray session. Each stage finds out by itself whether it was done before."""

from attrib.distributed import attribute, embed, index, manifest
from attrib.distributed.generators import identify
from attrib.pipeline_settings import PipelineSettings
from attrib.report import write_report
from attrib.storage import join


def run(settings: PipelineSettings) -> dict:
    """Run every stage and return a summary of what was made, and where."""
    stages = settings.stages()
    for role in ("sources", "generated"):
        manifest.run(stages[f"{role}/manifest"])
        embed.run(stages[f"{role}/embeddings"])
    built = index.run(stages["index"])
    if "generators" in stages:
        identify.run(stages["generators"])
    attributed = attribute.run(stages["attributions"])
    write_report(stages["report"])
    return {
        "sources indexed": f"{built['num_vectors']:,}",
        "generated images": f"{attributed['num_queries']:,} ({attributed['num_failed']:,} failed)",
        "attributions (Parquet)": join(settings.output, "attributions", "attributions"),
        "outcomes (Parquet)": join(settings.output, "attributions", "outcomes"),
        "page": stages["report"].output,
    }
