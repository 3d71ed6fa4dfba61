"""The fault campaign: seeded faults, each followed by the same command without a fault, and what came of them.

A command after a fault gives the results of an undisturbed run, or one error that names the file and a remedy. Which is
allowed depends on the fault: after a crash, a kill, a failing store or a full disk everything must be equal; a damaged
file may be refused.
"""

import random
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attrib.common.formats import text_table
from attrib.common.storage import Storage, join
from support.crashes import CRASH_CODE, MODES
from support.faulty_store import Fault, FaultyStore
from support.fork_server import HANG_CODE, Command, Ended, ForkServer
from support.stages import Place, difference, results, write_config

EQUAL, REFUSED = "equal", "refused"
OUTCOMES = (EQUAL, REFUSED, "DIFFERENT", "UNCLEAR", "HANG", "STUCK")
FOLDERS = {"manifest": "sources/manifest", "embed": "sources/embeddings", "index": "index", "attribute": "attributions"}
CHEAP = ("manifest", "index", "index", "attribute", "attribute", "embed")
CLEAN_CODES = (0, 1, 3)
SECONDS = 90  # a command that takes longer hangs; undisturbed, the slowest takes 6 on a free core


@dataclass(frozen=True)
class Report:
    """What came of a fault. detail: what was done and found, for a reader who repeats it."""

    kind: str
    outcome: str
    detail: str
    seconds: float


class Campaign:
    """Places with undisturbed runs, and one method per kind of fault, which returns the outcome and what was done.

    A place is made when a fault first needs it. folder: of everything. endpoint: of an S3 server.
    """

    def __init__(self, folder: Path, server: ForkServer, store: FaultyStore, ray_address: str):
        self.folder, self.server, self.store, self.ray_address = folder, server, store, ray_address
        self._places: dict[str, Place] = {}
        self._expected: dict[tuple[str, ...], dict[str, Any]] = {}
        self._num_writes: dict[tuple[str, str], int] = {}

    def place(self, kind: str) -> Place:
        """kind: "local", "arrow" or "s3fs"."""
        if kind not in self._places:
            values = {"client": kind, "endpoint": self.store.endpoint, "region": "us-east-1", "max_attempts": 2}
            values |= {"request_timeout_seconds": 5}
            is_local = kind == "local"
            place = Place(str(self.folder / "run") if is_local else f"s3://attrib/{kind}", {} if is_local else values)
            place.write_inputs()
            self._places[kind] = place
            self.undisturbed(place, "pipeline", place.run)
        return self._places[kind]

    def config(self, place: Place, stage: str, output: str, **changed: Any) -> str:
        name = f"{stage}-{random.getrandbits(48):012x}.yaml"
        return write_config(place.values(stage, output, **changed), self.folder / "configs" / name)

    def undisturbed(self, place: Place, stage: str, output: str, **changed: Any) -> None:
        """Run a stage and count its writes."""
        count = self.folder / f"count-{random.getrandbits(48):012x}"
        config = self.config(place, stage, output, **changed)
        (ended,) = self.server.run(Command(stage, config, {"count_to": str(count)}), seconds=300)
        assert ended.code == 0, ended.output
        self._num_writes[place.root, stage] = count.stat().st_size

    def num_writes(self, place: Place, stage: str) -> int:
        if (place.root, stage) not in self._num_writes:
            self.undisturbed(place, stage, join(place.root, "counted", stage))
        return self._num_writes[place.root, stage]

    def expected(self, place: Place, stage: str) -> dict[str, Any]:
        """The results of an undisturbed run of a stage."""
        if (place.root, stage) not in self._expected:
            output = place.run if stage == "pipeline" else join(place.run, FOLDERS[stage])
            self._expected[place.root, stage] = results(output, place.storage)
        return self._expected[place.root, stage]

    def repeat(self, place: Place, stage: str, output: str) -> tuple[str, str]:
        """Run a stage without a fault; return the outcome and what differs."""
        (ended,) = self.server.run(Command(stage, self.config(place, stage, output)), seconds=SECONDS)
        return self.judged(ended, place, stage, output, may_be_refused=False)

    def judged(self, ended: Ended, place: Place, stage: str, output: str, may_be_refused: bool) -> tuple[str, str]:
        if not is_clean(ended):
            return ("HANG" if ended.code == HANG_CODE else "UNCLEAR"), ended.output[-1500:]
        if ended.code:
            return (REFUSED if may_be_refused else "STUCK"), ended.message
        other = difference(results(output, place.storage), self.expected(place, stage))
        return ("DIFFERENT" if other else EQUAL), other


def is_clean(ended: Ended) -> bool:
    """Whether a job ended as it should: done, or with one error and no traceback."""
    errors = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    return ended.code in CLEAN_CODES and "Traceback" not in ended.output and len(errors) == (ended.code != 0)


def chosen_place(rng: random.Random) -> str:
    return rng.choice(("local", "local", "local", "arrow", "s3fs"))


def crash(campaign: Campaign, rng: random.Random, output: str) -> tuple[str, str]:
    """The process ends at one of its writes; the same again during the repetition, sometimes."""
    place, stage = campaign.place(chosen_place(rng)), rng.choice((*CHEAP, "pipeline"))
    output, doing = _below(place, output), []
    for _ in range(rng.choice((1, 1, 2))):
        inject = {"crash_at": rng.randint(1, campaign.num_writes(place, stage)), "mode": rng.choice(MODES)}
        command = Command(stage, campaign.config(place, stage, output), inject)
        (ended,) = campaign.server.run(command, seconds=SECONDS)
        doing.append(f"{stage} on {place.root}, {inject}")
        # The second crash may come after the end: less is left to write.
        if ended.code not in (CRASH_CODE, 0) or (ended.code == 0 and len(doing) == 1):
            return "UNCLEAR", f"{doing}: {ended.code} {ended.output[-1500:]}"
    outcome, detail = campaign.repeat(place, stage, output)
    return outcome, f"{doing}: {detail}"


def kill_at_a_moment(campaign: Campaign, rng: random.Random, output: str) -> tuple[str, str]:
    place, stage = campaign.place(chosen_place(rng)), rng.choice(CHEAP)
    output, after = _below(place, output), rng.uniform(0.02, 2.5 if stage in ("embed", "index") else 0.8)
    command = Command(stage, campaign.config(place, stage, output), kill_after=after)
    (ended,) = campaign.server.run(command, seconds=SECONDS)
    outcome, detail = campaign.repeat(place, stage, output)
    return outcome, f"{stage} on {place.root} after {after:.2f} s ({ended.code}): {detail}"


STORE_FAULTS = {
    "throttled": Fault("SlowDown"),
    "failing": Fault("InternalError"),
    "reset": Fault(reset=True),
    "reset after it was stored": Fault(reset=True, stored=True),
    "truncated": Fault(truncated=True),
    "slow": Fault(seconds=0.4),
    "refused": Fault("AccessDenied"),
    "expired": Fault("ExpiredToken"),
}


def failing_store(campaign: Campaign, rng: random.Random, output: str) -> tuple[str, str]:
    """Some requests fail, or all from one on, or those of one kind."""
    place, stage = campaign.place(rng.choice(("arrow", "s3fs"))), rng.choice(CHEAP)
    output, fault = _below(place, output), rng.choice(list(STORE_FAULTS))
    how, share, start = rng.choice(("some", "from one on", "one")), rng.choice((0.05, 0.3)), rng.randint(0, 60)
    drawn, before = random.Random(rng.random()), len(campaign.store.requests)

    def rule(method: str, path: str, number: int) -> Fault | None:
        number -= before
        hits = {"some": drawn.random() < share, "from one on": number >= start, "one": number == start}[how]
        return STORE_FAULTS[fault] if hits and (fault != "truncated" or method == "GET") else None

    doing = f"{stage} on {place.root}: {how} requests {fault} (from {start}, share {share})"
    campaign.store.fault = rule
    try:
        (ended,) = campaign.server.run(Command(stage, campaign.config(place, stage, output)), seconds=SECONDS)
    finally:
        campaign.store.fault = lambda method, path, number: None
    outcome, detail = campaign.judged(ended, place, stage, output, may_be_refused=True)
    # A store that fails only when the lease is released leaves it, which the job says; the next run deletes it.
    if outcome == REFUSED or detail == "writer.json (left)":
        doing += f" ({detail})"
        outcome, detail = campaign.repeat(place, stage, output)
    return outcome, f"{doing}: {detail}"


def disk_full(campaign: Campaign, rng: random.Random, output: str) -> tuple[str, str]:
    """No file may grow above a size (RLIMIT_FSIZE): writes fail half-way, as on a full disk, without a disk to fill."""
    place, stage = campaign.place("local"), rng.choice((*CHEAP, "pipeline"))
    limit = rng.choice((1, 200, 700, 1500, 3000, 6000))
    command = Command(stage, campaign.config(place, stage, output), {"max_file_bytes": limit})
    (ended,) = campaign.server.run(command, seconds=SECONDS)
    doing = f"{stage} with files of at most {limit} bytes"
    outcome, detail = campaign.judged(ended, place, stage, output, may_be_refused=True)
    if outcome == REFUSED and not re.search(r"[\w.-]+\.(json|parquet|npy|faiss|html)|attrib-", detail):
        return "UNCLEAR", f"{doing}: names no file: {detail}"
    if outcome == REFUSED:
        outcome, detail = campaign.repeat(place, stage, output)
    return outcome, f"{doing}: {detail}"


def damaged_file(campaign: Campaign, rng: random.Random, output: str) -> tuple[str, str]:
    """A file of a finished run is damaged; a stage that may read it runs, or the whole pipeline again."""
    place = campaign.place("local")
    kept = campaign.folder / "undamaged"
    if not kept.exists():
        shutil.copytree(place.run, kept)
    expected = {stage: campaign.expected(place, stage) for stage in (*FOLDERS, "pipeline")}
    file = rng.choice(_files(Path(place.run)))
    damage, stage = damaged(file, rng), rng.choice(("embed", "index", "attribute", "pipeline", "pipeline"))
    name = file.relative_to(place.run).as_posix()
    try:
        output = place.run if stage == "pipeline" else output
        (ended,) = campaign.server.run(Command(stage, campaign.config(place, stage, output)), seconds=SECONDS)
        outcome, detail = campaign.judged(ended, place, stage, output, may_be_refused=True)
        if outcome == "DIFFERENT" and stage == "pipeline":
            # What no stage reads again stays as it is, and is not answered from.
            found, wanted = ({k: v for k, v in r.items() if k != name} for r in _pair(place, expected["pipeline"]))
            if not (detail := difference(found, wanted)):
                outcome = EQUAL
        if outcome == REFUSED and file.name not in ended.message and file.parent.name not in ended.message:
            outcome = "UNCLEAR"
    finally:
        shutil.rmtree(place.run)
        shutil.copytree(kept, place.run)
    return outcome, f"{name} {damage}, then {stage}: {detail}"


def damaged_after_crash(campaign: Campaign, rng: random.Random, output: str) -> tuple[str, str]:
    """A file that an unfinished run left is damaged before the run continues."""
    place, stage = campaign.place("local"), rng.choice(CHEAP)
    inject = {"crash_at": rng.randint(3, campaign.num_writes(place, stage)), "mode": rng.choice(MODES)}
    campaign.server.run(Command(stage, campaign.config(place, stage, output), inject), seconds=SECONDS)
    files = [file for file in _files(Path(output)) if file.name != "writer.json"]
    if not files:
        return EQUAL, f"{stage}, {inject}: nothing was left"
    file = rng.choice(files)
    damage = damaged(file, rng)
    (ended,) = campaign.server.run(Command(stage, campaign.config(place, stage, output)), seconds=SECONDS)
    outcome, detail = campaign.judged(ended, place, stage, output, may_be_refused=True)
    if outcome == REFUSED and file.name not in ended.message and file.parent.name not in ended.message:
        outcome = "UNCLEAR"
    return outcome, f"{stage}, {inject}, then {file.relative_to(output)} {damage}: {detail}"


def damaged(file: Path, rng: random.Random) -> str:
    """Damage a file; return how."""
    data, kind = file.read_bytes(), rng.choice(("bit", "bit", "bit", "cut", "empty", "zeros", "longer", "deleted"))
    at = rng.randrange(max(1, len(data)))
    if kind == "deleted":
        file.unlink()
        return kind
    if kind == "bit" and data:
        changed = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    elif kind == "zeros":
        changed = data[:at] + bytes(len(data) - at)
    else:
        changed = {"cut": data[:at], "longer": data + b"\0"}.get(kind, b"")
    file.write_bytes(changed)
    return f"{kind} at {at} of {len(data)}"


def two_drivers(campaign: Campaign, rng: random.Random, output: str) -> tuple[str, str]:
    """Two drivers write to one output, with equal or other settings; one of them dies, sometimes."""
    place, stage = campaign.place(chosen_place(rng)), rng.choice(CHEAP)
    output = _below(place, output)
    other = {"manifest": {"partition_rows": 5}, "embed": {"max_megapixels": 50}}
    other |= {"index": {"recall_k": 1}, "attribute": {"top_k": 2}}
    changed = rng.choice(({}, other[stage]))
    inject = (
        {"crash_at": rng.randint(1, campaign.num_writes(place, stage)), "mode": "half"} if rng.random() < 0.4 else {}
    )
    first = Command(stage, campaign.config(place, stage, output))
    second = Command(stage, campaign.config(place, stage, output, **changed), inject)
    both = campaign.server.run(first, second, seconds=SECONDS)
    doing = f"{stage} on {place.root}, second {changed} {inject} (codes {[ended.code for ended in both]})"
    for ended in both:
        if not is_clean(ended) and not (inject and ended.code == CRASH_CODE):
            return ("HANG" if ended.code == HANG_CODE else "UNCLEAR"), f"{doing}: {ended.output[-1500:]}"
    codes = [ended.code for ended in both]
    if (0 not in codes and CRASH_CODE not in codes) or (changed and codes == [0, 0]):
        return "STUCK" if 0 not in codes else "DIFFERENT", f"{doing}: {[ended.message for ended in both]}"
    if changed and codes[0] != 0:  # the output belongs to the other settings
        (ended,) = campaign.server.run(Command(stage, second.config), seconds=SECONDS)
        (refused,) = campaign.server.run(first, seconds=SECONDS)
        if ended.code == 0 and refused.code == 1 and "belongs to a run with other settings" in refused.message:
            return EQUAL, doing
        if ended.code:  # the crash came before anything was written, so the first command may have it
            return campaign.repeat(place, stage, output)
        return "UNCLEAR", f"{doing}: {ended.message} / {refused.message}"
    outcome, detail = campaign.repeat(place, stage, output)
    return outcome, f"{doing}: {detail}"


def _below(place: Place, output: str) -> str:
    """The output of a fault in a place."""
    return output if not place.storage_values else join(place.root, "faults", Path(output).name)


def _files(folder: Path) -> list[Path]:
    """Files that a job wrote, but not its page, locks and temporary files."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not file.name.startswith(".") and file.suffix != ".html"
    )


def _pair(place: Place, expected: dict[str, Any]) -> Iterable[dict[str, Any]]:
    return results(place.run, Storage(place.storage.settings)), expected


def table(reports: list[Report]) -> str:
    """kind x outcome, as text."""
    by_kind = {kind: [report for report in reports if report.kind == kind] for kind in {r.kind for r in reports}}
    rows = [_row(kind, by_kind[kind]) for kind in sorted(by_kind)] + [_row("all", reports)]
    return text_table({"fault": "left"} | dict.fromkeys(OUTCOMES, "right") | {"seconds": "right"}, rows)


def _row(name: str, reports: list[Report]) -> list[str]:
    counts = Counter(report.outcome for report in reports)
    return [name, *(str(counts[outcome]) for outcome in OUTCOMES), f"{sum(r.seconds for r in reports):.0f}"]
