"""The files of cluster/ agree with Ray's own schema, with each other, and with the configs and pins that they name."""

import re
from pathlib import Path

import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

import attrib

ROOT = Path(__file__).resolve().parents[2]
IMAGE = f"attrib:{attrib.__version__}"


def load(name: str) -> dict:
    return yaml.safe_load((ROOT / "cluster" / name).read_text())


def named_module_and_config(command: str) -> tuple[Path, Path]:
    found = re.search(r"python -m jobs\.(\w+) --config (?:/app/)?(\S+)", command)
    return ROOT / "jobs" / f"{found[1]}.py", ROOT / found[2]


def containers(cluster: dict) -> list[dict]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


def test_rayjob_names_what_exists():
    job = load("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert all(path.is_file() for path in named_module_and_config(job["spec"]["entrypoint"]))
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == ray.__version__
    assert {container["image"] for container in containers(job["spec"]["rayClusterSpec"])} == {IMAGE}


def test_rayjob_sets_every_variable_of_its_config():
    job = load("rayjob.yaml")
    _, config = named_module_and_config(job["spec"]["entrypoint"])
    wanted = set(re.findall(r"\$\{(\w+)\}", config.read_text()))
    for container in containers(job["spec"]["rayClusterSpec"]):
        assert wanted <= {variable["name"] for variable in container["env"]}


def test_rayjob_keeps_secrets_in_secrets():
    cluster = load("rayjob.yaml")["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "attrib-ray-token"}
    for container in containers(cluster):
        assert container["envFrom"] == [{"secretRef": {"name": "attrib-s3"}}]
        assert not [
            v for v in container["env"] if "SECRET" in v["name"] or "TOKEN" in v["name"] or "ACCESS_KEY" in v["name"]
        ]


def test_rayjob_requests_are_limits_and_gpus_are_embedding_only():
    cluster = load("rayjob.yaml")["spec"]["rayClusterSpec"]
    gpus = {}
    for group in cluster["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        gpus[group["groupName"]] = container["resources"]["limits"].get("nvidia.com/gpu")
    assert gpus == {"gpu": "1", "cpu": None}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_aws_passes_ray_s_own_check():
    prepared = prepare_config(load("aws.yaml"))
    validate_config(prepared)
    assert prepared["setup_commands"] == [], "the launcher's defaults would install another Ray"


def test_aws_buys_spot_gpus_and_an_on_demand_head():
    config = load("aws.yaml")
    types = config["available_node_types"]
    assert config["docker"]["image"] == IMAGE
    assert "InstanceMarketOptions" not in types[config["head_node_type"]]["node_config"]
    assert types["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
    assert all(path.is_file() for path in named_module_and_config((ROOT / "cluster" / "aws.yaml").read_text()))


def test_image_copies_what_exists_and_is_not_root():
    lines = (ROOT / "cluster" / "Dockerfile").read_text().splitlines()
    copied = [line.split()[1] for line in lines if line.startswith("COPY")]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    assert [line for line in lines if line.startswith("USER")] == ["USER ray"]
