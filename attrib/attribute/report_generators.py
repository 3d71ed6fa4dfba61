"""What the report shows of the generators: the summary of jobs.identify, with what only its own record tells."""

from attrib.common.errors import AttribError
from attrib.common.storage import Storage
from attrib.generators.identify.files import open_identified

SHOWN_EXEMPLARS = 6  # of a candidate generator
SHOWN_SETS = 20


def generator_section(record: dict, storage: Storage) -> dict | None:
    """The summary that jobs.attribute took over, None without one, as the page needs it: `rates`, the verdict settings, None where the identify
    run is gone, and `left_out_rates`, {} there; `exemplar_ids`, of the queries that are shown as pictures; sets and candidates cut to what is
    shown.

    Runs of earlier versions have no recognised rates, no list of sets and no count of distinct images.
    """
    said = record.get("generators")
    if said is None:
        return None
    candidates = [
        {"num_distinct": None} | candidate | {"exemplars": candidate["exemplars"][:SHOWN_EXEMPLARS]}
        for candidate in said["candidates"]
    ]
    sets = said["sets"] and said["sets"] | {"listed": said["sets"].get("listed", [])[:SHOWN_SETS]}
    own = _own_record(record["settings"].get("generators"), storage)
    return said | {
        "rates": own["settings"]["verdicts"] if own else None,
        "left_out_rates": own.get("left_out_rates", {}) if own else {},
        "recognised": said.get("recognised") or {},
        "candidates": candidates,
        "exemplar_ids": [row["id"] for candidate in candidates for row in candidate["exemplars"]],
        "sets": sets,
    }


def _own_record(uri: str | None, storage: Storage) -> dict | None:
    try:
        return open_identified(uri, storage).record if uri else None
    except (AttribError, OSError):
        return None
