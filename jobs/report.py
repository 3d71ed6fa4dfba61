"""Write a self-contained HTML page about an attribution run: python -m jobs.report --config FILE"""

from attrib.attribute.settings import ReportSettings
from attrib.common.config import parse_arguments
from jobs.exit import reported


def main() -> None:
    settings = parse_arguments(ReportSettings, __doc__)
    with reported():
        from attrib.attribute.report import write_report

        summary = write_report(settings)
        print(
            f"run {summary['run_id']}: {summary['num_attributed']:,} of {summary['num_queries']:,} queries "
            f"attributed, {summary['num_failed']:,} failed"
        )
        if summary["num_attributed"]:
            print(
                f"{summary['num_clear']:,} with a clear source (top similarity >= {settings.clear_similarity:g}), "
                f"median top similarity {summary['median_top_similarity']:.3f}, "
                f"{summary['num_sources_named']:,} distinct sources"
            )
        if summary["num_unread_sources"]:
            print(f"{summary['num_unread_sources']:,} listed sources could not be read and cannot be found")
        if summary["num_missing_images"]:
            print(f"{summary['num_missing_images']:,} originals could not be shown; the page gives the reasons")
        print(f"{summary['output']} ({summary['num_bytes'] / 2**20:.1f} MiB)")


if __name__ == "__main__":
    main()
