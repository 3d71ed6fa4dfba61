"""Build a sharded index over the embeddings of the sources: python -m jobs.index --config FILE"""

from attrib.common.config import parse_arguments
from attrib.index.settings import IndexSettings
from jobs.exit import note_if_finished, reported


def main() -> None:
    settings = parse_arguments(IndexSettings, __doc__)
    with reported():
        from attrib.index import job

        record = job.run(settings)
        recall = record["recall"]
        print(
            f"{record['num_vectors']:,} vectors in {len(record['shards'])} shard(s), "
            f"recall@{recall['k']} {recall['recall']:.4f}, in {settings.output}"
        )
        note_if_finished(record)


if __name__ == "__main__":
    main()
