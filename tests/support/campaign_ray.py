"""Faults of the campaign with a real Ray: a worker dies at a write, the driver or the raylet is killed."""

import contextlib
import io
import logging
import random
from pathlib import Path

import pytest
import ray

from attrib.attribute import job as attribute_job
from attrib.attribute import merge
from attrib.attribute.settings import AttributeSettings
from attrib.data import job as manifest_job
from attrib.data.settings import ManifestSettings
from attrib.embed import job as embed_job
from attrib.embed.settings import EmbedSettings
from attrib.index import job as index_job
from attrib.index.settings import IndexSettings
from attrib.runtime import tasks
from jobs.exit import reported
from support import crashes
from support.campaign import CHEAP, EQUAL, SECONDS, Campaign
from support.crashes import MODES, at_write_of_a_task, dying_at_write
from support.fork_server import Command, Ended
from support.stages import Place

JOBS = {
    "manifest": (manifest_job, ManifestSettings),
    "embed": (embed_job, EmbedSettings),
    "index": (index_job, IndexSettings),
    "attribute": (attribute_job, AttributeSettings),
}
ray.cloudpickle.register_pickle_by_value(crashes)  # the path of Ray's workers lacks the tests
# Of three embed runs on Ray, each starts an actor that loads torch: seconds.
ON_RAY = ("manifest", "manifest", "index", "index", "index", "attribute", "attribute", "attribute", "embed")


def run_here(stage: str, place: Place, output: str) -> Ended:
    """Run a job in this process, whose Ray has workers already."""
    job, settings = JOBS[stage]
    log, code = io.StringIO(), 0
    handler = logging.StreamHandler(log)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        with contextlib.suppress(SystemExit), reported():
            try:
                job.run(settings(**place.values(stage, output)))
            except BaseException:
                code = 1
                raise
    finally:
        logging.getLogger().removeHandler(handler)
    return Ended(code, log.getvalue().replace("ERROR: ", "error: "), 0.0)


def worker_dies(campaign: Campaign, rng: random.Random, output: str) -> tuple[str, str]:
    """Ray repeats what a worker did that ended at a write, so the job itself goes on to its end."""
    place, stage = campaign.place("local"), rng.choice(ON_RAY)
    at, mode = rng.randint(1, 6 if stage != "attribute" else 24), rng.choice(MODES)
    folder = campaign.folder / "counts" / Path(output).name
    folder.mkdir(parents=True)
    run_units, map_chunks = tasks.run_units, embed_job.map_chunks

    def run_dying(function, units, **resources):
        return run_units(at_write_of_a_task(function, at, mode, str(folder)), units, **resources)

    def map_dying(worker, *arguments, **options):
        return map_chunks(dying_at_write(worker, at, mode, str(folder)), *arguments, **options)

    with pytest.MonkeyPatch.context() as patched:
        for module in (tasks, embed_job, merge):
            patched.setattr(module, "run_units", run_dying)
        patched.setattr(embed_job, "map_chunks", map_dying)
        ended = run_here(stage, place, output)
    outcome, detail = campaign.judged(ended, place, stage, output, may_be_refused=False)
    return outcome, f"{stage}, a worker {mode} write {at}: {detail}"


def killed_on_ray(campaign: Campaign, rng: random.Random, output: str) -> tuple[str, str]:
    """SIGKILL of a driver, whose workers live on for a moment while the same command runs again."""
    stage = rng.choice(ON_RAY)
    return _killed(campaign, stage, output, "job", rng.uniform(0.5, 4), {"address": campaign.ray_address})


def raylet_killed(campaign: Campaign, rng: random.Random, output: str) -> tuple[str, str]:
    """SIGKILL of the raylet: the node is lost, and the driver with it. What Ray prints then is not judged."""
    stage = rng.choice(("index", "attribute", "manifest"))
    return _killed(campaign, stage, output, "raylet", rng.uniform(2, 7), {"num_cpus": 1, "object_store_gib": 0.1})


def _killed(campaign: Campaign, stage: str, output: str, kill: str, after: float, ray_values: dict) -> tuple[str, str]:
    place = campaign.place("local")
    config = campaign.config(place, stage, output, ray=ray_values)
    command = Command(stage, config, {"use_ray": True}, kill_after=after, kill=kill)
    (ended,) = campaign.server.run(command, seconds=SECONDS)
    doing = f"{stage}, {kill} killed after {after:.2f} s (code {ended.code}, {ended.seconds:.1f} s)"
    if ended.seconds >= SECONDS:
        return "HANG", doing
    outcome, detail = campaign.repeat(place, stage, output)
    return outcome, f"{doing}: {detail}"


def undisturbed_on_ray(campaign: Campaign) -> list[tuple[str, str]]:
    """Runs with and without Ray are equal: what the other kinds of faults rest on."""
    place, found = campaign.place("local"), []
    for stage in dict.fromkeys(CHEAP):
        output = str(campaign.folder / "on-ray" / stage)
        ended = run_here(stage, place, output)
        found.append(campaign.judged(ended, place, stage, output, may_be_refused=False))
    return [pair for pair in found if pair[0] != EQUAL]
