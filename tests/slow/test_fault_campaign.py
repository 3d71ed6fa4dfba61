"""Seeded faults in every stage: the same command again gives the same results, or one error that names the file.

`--faults 500` is the long form. `--seed S --only-fault K` repeats one fault.
"""

import random
import time

import pytest
from support.campaign import (
    EQUAL,
    REFUSED,
    Campaign,
    Report,
    crash,
    damaged_after_crash,
    damaged_file,
    disk_full,
    failing_store,
    kill_at_a_moment,
    table,
    two_drivers,
)
from support.campaign_ray import killed_on_ray, raylet_killed, undisturbed_on_ray, worker_dies
from support.faulty_store import FaultyStore
from support.fork_server import ForkServer
from support.registry_race import registry_race

# How often each kind occurs in a round. Those with a real Ray cost ten times as much as the others.
KINDS = {
    crash: 22,
    kill_at_a_moment: 6,
    failing_store: 12,
    disk_full: 6,
    damaged_file: 14,
    damaged_after_crash: 6,
    two_drivers: 6,
    registry_race: 5,
    worker_dies: 3,
    killed_on_ray: 1,
    raylet_killed: 1,
}
MAY_BE_REFUSED = (damaged_file, damaged_after_crash)
SHORT = (crash, kill_at_a_moment, failing_store, disk_full, damaged_file, damaged_after_crash, two_drivers)
SHORT += (registry_race, worker_dies)  # the kinds that are drawn from first, one of each


@pytest.fixture(scope="module")
def campaign(tmp_path_factory, local_ray, s3_endpoint):
    with ForkServer() as server, FaultyStore(s3_endpoint) as store:
        yield Campaign(tmp_path_factory.mktemp("campaign"), server, store, local_ray)


def kind_of(number: int, seed: int):
    """The kind of a fault: the first ones are one of each in SHORT, then each round is the kinds of KINDS, shuffled."""
    if number < len(SHORT):
        return SHORT[number]
    round_number, place = divmod(number - len(SHORT), sum(KINDS.values()))
    kinds = [kind for kind, count in KINDS.items() for _ in range(count)]
    random.Random(f"{seed}-{round_number}").shuffle(kinds)
    return kinds[place]


def test_with_and_without_ray_the_results_are_equal(campaign):
    assert undisturbed_on_ray(campaign) == []


@pytest.mark.timeout(3600)
def test_no_fault_changes_a_result_in_silence(campaign, request):
    seed, only = request.config.getoption("--seed"), request.config.getoption("--only-fault")
    numbers = range(request.config.getoption("--faults")) if only is None else [only]
    reports, wrong, started = [], [], time.monotonic()
    for number in numbers:
        kind, began = kind_of(number, seed), time.monotonic()
        outcome, detail = kind(campaign, random.Random(f"{seed}-{number}"), str(campaign.folder / f"fault-{number}"))
        reports.append(Report(kind.__name__, outcome, detail, time.monotonic() - began))
        if outcome != EQUAL and (outcome != REFUSED or kind not in MAY_BE_REFUSED):
            wrong.append(f"--seed {seed} --only-fault {number}: {kind.__name__} {outcome}: {detail}")
            print(wrong[-1], flush=True)
        elif only is not None:
            print(f"{kind.__name__} {outcome}: {detail}")
    print(f"\n{table(reports)}\n{len(reports)} faults in {time.monotonic() - started:.0f} s, seed {seed}")
    assert not wrong, "\n\n".join(wrong)
