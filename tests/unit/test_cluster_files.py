"""The files of cluster/ agree with Ray's own schema, with each other, and with the configs and pins that they name."""

import re
import tomllib
from pathlib import Path

import pytest
import ray
import yaml
from ray.autoscaler._private.aws.config import _configure_security_group
from ray.autoscaler._private.util import prepare_config, validate_config

import attrib

ROOT = Path(__file__).resolve().parents[2]
IMAGE = f"attrib:{attrib.__version__}"


def load(name: str) -> dict:
    return yaml.safe_load((ROOT / "cluster" / name).read_text())


def named_module_and_config(command: str) -> tuple[Path, Path]:
    found = re.search(r"python -m jobs\.(\w+) --config (?:/app/)?(\S+)", command)
    return ROOT / "jobs" / f"{found[1]}.py", ROOT / found[2]


def pod_templates(job: dict) -> list[dict]:
    """All pods of a RayJob: submitter, head and workers."""
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [job["spec"]["submitterPodTemplate"], *(group["template"] for group in groups)]


def instructions() -> list[tuple[str, str]]:
    """(name, arguments) of each instruction of the Dockerfile."""
    text = (ROOT / "cluster" / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, " ".join(arguments.split())) for name, _, arguments in (line.partition(" ") for line in lines)]


def values_below(value, key: str):
    """Values of a key at any depth."""
    if isinstance(value, dict):
        yield from (item for name, item in value.items() if name == key)
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from values_below(item, key)


def containers(cluster: dict) -> list[dict]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


def test_rayjob_names_what_exists():
    job = load("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert all(path.is_file() for path in named_module_and_config(job["spec"]["entrypoint"]))
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == ray.__version__
    assert {pod["spec"]["containers"][0]["image"] for pod in pod_templates(job)} == {IMAGE}


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


def test_pods_have_no_rights_and_write_to_their_own_volumes_only():
    for pod in (template["spec"] for template in pod_templates(load("rayjob.yaml"))):
        assert pod["automountServiceAccountToken"] is False
        security = pod["securityContext"]
        assert security["runAsNonRoot"] and security["runAsUser"] == security["runAsGroup"] == 1000
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert {"/tmp", "/home/ray"} <= set(mounted.values()), "Ray and the caches write there"
        assert all(volume.keys() == {"name", "emptyDir"} for volume in pod["volumes"])
        assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}
    for key in ("privileged", "hostNetwork", "hostPID", "hostIPC", "hostPath", "hostPort"):
        assert not list(values_below(load("rayjob.yaml"), key))


def test_network_policy_lets_in_the_cluster_and_the_operator_alone():
    policy, templates = load("network_policy.yaml"), pod_templates(load("rayjob.yaml"))
    own = policy["spec"]["podSelector"]
    assert (policy["apiVersion"], policy["kind"]) == ("networking.k8s.io/v1", "NetworkPolicy")
    assert all(own["matchLabels"].items() <= template["metadata"]["labels"].items() for template in templates)
    assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    cluster, operator = policy["spec"]["ingress"]
    assert cluster == {"from": [{"podSelector": own}]}
    (peer,) = operator["from"]
    assert peer["namespaceSelector"]["matchLabels"] and peer["podSelector"]["matchLabels"]
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]


def test_network_policy_lets_out_to_the_cluster_dns_and_the_object_store():
    policy = load("network_policy.yaml")
    cluster, dns, store = policy["spec"]["egress"]
    assert cluster == {"to": [{"podSelector": policy["spec"]["podSelector"]}]}
    assert dns["to"][0]["podSelector"] == {"matchLabels": {"k8s-app": "kube-dns"}}
    assert {(port["protocol"], port["port"]) for port in dns["ports"]} == {("UDP", 53), ("TCP", 53)}
    assert store["ports"] == [{"protocol": "TCP", "port": 443}]
    (peer,) = store["to"]
    assert {"10.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16"} <= set(peer["ipBlock"]["except"])


def test_aws_instances_answer_imdsv2_only_and_encrypt_their_disks():
    for name, node in load("aws.yaml")["available_node_types"].items():
        config = node["node_config"]
        metadata = config["MetadataOptions"]
        assert (metadata["HttpTokens"], metadata["HttpPutResponseHopLimit"]) == ("required", 1), name
        assert config["BlockDeviceMappings"]
        assert all(disk["Ebs"]["Encrypted"] is True for disk in config["BlockDeviceMappings"]), name


def test_aws_opens_ssh_to_no_one_but_the_user(monkeypatch):
    """Ray makes a group that opens port 22 to everyone for each node type without one."""

    def make_group(*_):
        pytest.fail("Ray would make a security group of its own")

    monkeypatch.setattr("ray.autoscaler._private.aws.config._upsert_security_groups", make_group)
    config = prepare_config(load("aws.yaml"))
    _configure_security_group(config)
    assert all(node["node_config"]["SecurityGroupIds"] for node in config["available_node_types"].values())
    opened = re.findall(r"--cidr (\S+)", (ROOT / "cluster" / "aws.yaml").read_text())
    assert opened == ["YOUR-ADDRESS/32"] and "0.0.0.0/0" not in str(config)
    assert {"--cap-drop=ALL", "--security-opt=no-new-privileges"} <= set(config["docker"]["run_options"])


def test_image_has_a_base_by_digest_and_packages_by_hash():
    steps = instructions()
    assert steps[:2] == [("ARG", "PYTHON_DIGEST"), ("FROM", "python:3.11-slim@${PYTHON_DIGEST}")], "no default"
    installs = [arguments for name, arguments in steps if name == "RUN" and re.search(r"\bpip3? ", arguments)]
    assert len(installs) == 2
    assert "--require-hashes -r requirements.lock" in installs[0]
    assert {"--no-deps", "--no-build-isolation", "--no-index"} <= set(installs[1].split())
    assert ("COPY", "cluster/requirements.lock ./") in steps
    on_nodes = [load("aws.yaml")[f"{kind}setup_commands"] for kind in ("", "head_", "worker_")]
    assert on_nodes == [[], [], []], "what a node installs later has no hashes"


def test_the_lock_is_made_by_the_readme_and_names_no_host():
    readme = (ROOT / "cluster" / "README.md").read_text()
    (command,) = re.findall(r"^pip-compile .*?pyproject\.toml$", readme, re.MULTILINE | re.DOTALL)
    wanted = {
        "--generate-hashes",
        "--allow-unsafe",
        "--build-deps-for",
        "--no-emit-index-url",
        "--no-emit-trusted-host",
    }
    assert wanted <= set(command.split())
    assert "--output-file cluster/requirements.lock" in command
    assert "/cluster/requirements.lock" in (ROOT / ".gitignore").read_text().splitlines()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "--extra aws" in command and [re.split("[=<>]", need)[0] for need in extras["aws"]] == ["boto3"]
    texts = [path.read_text() for path in (ROOT / "cluster").iterdir() if path.suffix != ".lock" and path.is_file()]
    assert not re.search(r"--(extra-)?index-url|--find-links|--trusted-host", "\n".join(texts))


def test_image_copies_what_exists_and_is_not_root():
    steps = instructions()
    made = {"cluster/requirements.lock"}
    copied = {source for name, arguments in steps if name == "COPY" for source in arguments.split()[:-1]}
    assert [source for source in copied - made if not (ROOT / source).exists()] == []
    assert [arguments for name, arguments in steps if name == "USER"] == ["1000:1000"]
    assert steps.index(("USER", "1000:1000")) > max(i for i, (name, _) in enumerate(steps) if name == "RUN")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"]} <= copied, "pip needs them to build the package"
