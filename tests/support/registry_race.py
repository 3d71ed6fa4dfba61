"""The fault of the campaign that concerns a registry: several processes change it at once, and some of them die."""

import random
from pathlib import Path

from attrib.common.storage import join
from attrib.generators.registry.registry import open_registry
from support.campaign import SECONDS, Campaign, is_clean
from support.crashes import CRASH_CODE, MODES
from support.fork_server import HANG_CODE, Command
from support.generators import KERNELS, drawn_file, write_spectrum_method
from support.images import write_folder
from support.stages import Place, write_config

NUM_IMAGES = 10
MAX_WRITES = 5  # of the first registration


def registry_race(campaign: Campaign, rng: random.Random, output: str) -> tuple[str, str]:
    """Registrations of several generators at once; two of them may want the same name. Those that died run again.

    Afterwards each name has one entry, with the references of an undisturbed registration.
    """
    place = campaign.place(rng.choice(("local", "local", "arrow", "s3fs")))
    _prepare(campaign, place)
    registry = output if not place.storage_values else join(place.root, "faults", Path(output).name)
    names = rng.sample(list(KERNELS), rng.randint(2, 3))
    names += rng.sample(names, rng.choice((0, 1)))
    injects = [
        {"crash_at": rng.randint(1, MAX_WRITES), "mode": rng.choice(MODES)} if rng.random() < 0.3 else {} for _ in names
    ]
    commands = [Command("registry", _config(campaign, place, registry, name), i) for name, i in zip(names, injects)]
    ended = campaign.server.run(*commands, seconds=SECONDS)
    doing = f"registry on {place.root}: {list(zip(names, injects, (one.code for one in ended)))}"
    for one in ended:
        if one.code != CRASH_CODE and not is_clean(one):
            return ("HANG" if one.code == HANG_CODE else "UNCLEAR"), f"{doing}: {one.output[-1500:]}"
    for name in {name for name, one in zip(names, ended) if one.code == CRASH_CODE}:
        (again,) = campaign.server.run(Command("registry", _config(campaign, place, registry, name)), seconds=SECONDS)
        if not is_clean(again) or (again.code and f"{name!r} is in" not in again.message):
            return "UNCLEAR", f"{doing}: {again.output[-1500:]}"
    held = open_registry(registry, place.storage)
    found = sorted((entry.name, entry.sha256) for entry in held.entries)
    wanted = sorted((name, _undisturbed(campaign, place, name)) for name in set(names))
    for entry in held.entries:
        held.read(entry, place.storage)
    return ("equal" if found == wanted else "DIFFERENT"), f"{doing}: {[name for name, _ in found]}"


def _prepare(campaign: Campaign, place: Place) -> None:
    if place.storage.exists(join(place.root, "in/nearest/0.png")):
        return
    write_spectrum_method(join(place.root, "method"), place.storage)
    for trace in KERNELS:
        images = {f"{i}.png": drawn_file(trace, i) for i in range(NUM_IMAGES)}
        write_folder(dict(reversed(images.items())), join(place.root, "in", trace), place.storage)


def _config(campaign: Campaign, place: Place, registry: str, name: str) -> str:
    values = {"action": "register", "registry": registry, "name": name, "storage": place.storage_values}
    values |= {"method": {"name": "log-spectrum", "uri": join(place.root, "method")}, "degradations": ["none"]}
    values |= {"images": {"name": name, "uri": join(place.root, "in", name)}}
    return write_config(values, campaign.folder / "configs" / f"registry-{random.getrandbits(48):012x}.yaml")


def _undisturbed(campaign: Campaign, place: Place, name: str) -> str:
    """The digest of the references of a generator, registered alone; the same in every place."""
    registry = join(place.root, "undisturbed-registries", name)
    if not place.storage.exists(join(registry, "registry.json")):
        (ended,) = campaign.server.run(Command("registry", _config(campaign, place, registry, name)), seconds=SECONDS)
        assert ended.code == 0, ended.output
    return open_registry(registry, place.storage).entries[0].sha256
