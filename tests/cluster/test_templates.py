"""The cluster files: what Ray, Kubernetes' rules and MLflow say of them, and what they promise about security."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import click
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.cli import cli as mlflow_cli
from mlflow.exceptions import MlflowException
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli as ray_cli

FOLDER = Path(__file__).parents[2] / "cluster"
LAUNCHED = ("cluster.yaml", "local.yaml")
PROJECT = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]
START_KEYS = ("head_start_ray_commands", "worker_start_ray_commands")


def read(name: str) -> dict[str, Any]:
    return next(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def documents(name: str) -> dict[str, dict[str, Any]]:
    found = yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8"))
    return {document["kind"]: document for document in found}


def parse(command: click.Command, words: list[str]) -> dict[str, Any]:
    """Options of a command line, read by the program's own parser; raises for what it does not know."""
    group = command
    while isinstance(group, click.Group):
        group = group.commands[words[0]]
        words = words[1:]
    context = click.Context(group, resilient_parsing=False)
    group.parse_args(context, list(words))
    return context.params


def start_options(name: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """``(key, shell line, options)`` of every ``ray start`` in a cluster file."""
    for key in START_KEYS:
        for line in read(name)[key]:
            if " ray start " in line:
                words = shlex.split(line.partition(" ray start ")[2])
                yield key, line, parse(ray_cli, ["start", *words])


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_takes_the_cluster_file(name: str) -> None:
    config = prepare_config(read(name))
    if name == "cluster.yaml":
        config["available_node_types"]["gpu_worker"]["resources"] = {
            "CPU": 4,
            "GPU": 1,
        }  # asked of EC2 at `ray up`
    validate_config(config)
    config["head_setup_comands"] = []
    with pytest.raises(Exception, match="head_setup_comands"):
        validate_config(config)


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_is_started_closed(name: str) -> None:
    starts = list(start_options(name))
    assert [key for key, *_ in starts] == list(START_KEYS)
    for key, line, options in starts:
        assert "RAY_AUTH_MODE=token ray start" in line
        assert options["disable_usage_stats"]
        assert options["ray_debugger_external"] is False
        if key.startswith("head"):
            assert options["head"]
            assert options["dashboard_host"] == "127.0.0.1"
            assert options["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
        else:
            assert options["address"] == "$RAY_HEAD_IP:6379"
    assert any(line.startswith("pkill -f '[r]ay.util.client.server'") for line in read(name)[START_KEYS[0]])


@pytest.mark.parametrize("name", LAUNCHED)
def test_token_package_and_environment_reach_every_node(name: str) -> None:
    config = read(name)
    mounts = config["file_mounts"]
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]
    assert mounts["~/.stillhouse/environment.sh"] == "environment.sh"
    wheel = f"stillhouse-{PROJECT['version']}-py3-none-any.whl"
    assert mounts[f"~/.stillhouse/{wheel}"] == f"dist/{wheel}"
    installs = [line for line in config["setup_commands"] if "pip install" in line]
    assert all(wheel in line for line in installs)
    assert len(installs) == 2


@pytest.mark.parametrize("name", LAUNCHED)
def test_shell_lines_are_shell(name: str) -> None:
    config = read(name)
    for key in ("setup_commands", "head_setup_commands", *START_KEYS):
        for line in config.get(key, []):
            checked = subprocess.run(["bash", "-n", "-c", line], capture_output=True, text=True, check=False)
            assert checked.returncode == 0, f"{key}: {line}: {checked.stderr}"


def test_login_shell_has_the_environment_and_token_mode(tmp_path: Path) -> None:
    show = f". {FOLDER / 'environment.sh'}; echo $RAY_AUTH_MODE; echo $PATH"
    shown = subprocess.run(["bash", "-c", show], env={"HOME": str(tmp_path), "PATH": "/bin"}, capture_output=True, text=True, check=True)  # fmt: skip
    assert shown.stdout.split() == ["token", f"{tmp_path}/.stillhouse/venv/bin:/bin"]


def test_secrets_are_never_written_down() -> None:
    for path in FOLDER.iterdir():
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            assert not re.search(
                r"RAY_AUTH_TOKEN[=:]\s*\S|AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY", text
            ), path
    settings = read("mlflow.yaml")["services"]["mlflow"]["environment"]
    for name in ("MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"):
        assert re.fullmatch(r"\$\{[A-Z_]+:\?.+\}", settings[name])  # compose refuses to start without


@pytest.fixture
def amazon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    with mock_aws():
        yield


@pytest.mark.usefixtures("amazon")
def test_amazon_is_asked_for_a_closed_cluster() -> None:
    """Ray's own bootstrap against a simulated EC2: the security group that it makes, and the nodes' settings."""
    config = AWSNodeProvider.fillout_available_node_types_resources(prepare_config(read("cluster.yaml")))
    validate_config(config)
    resolved = bootstrap_aws(config)
    kinds = resolved["available_node_types"]
    head, worker = kinds["head"]["node_config"], kinds["gpu_worker"]["node_config"]
    assert "InstanceMarketOptions" not in head
    assert worker["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert kinds["head"]["resources"]["CPU"] == 0
    assert kinds["head"]["resources"].get("GPU", 0) == 0
    assert kinds["gpu_worker"]["resources"]["GPU"] == 1
    assert (kinds["gpu_worker"]["min_workers"], kinds["gpu_worker"]["max_workers"]) == (0, 8)
    groups = set(head["SecurityGroupIds"] + worker["SecurityGroupIds"])
    client = boto3.client("ec2", region_name=resolved["provider"]["region"])
    rules = [
        rule
        for group in client.describe_security_groups(GroupIds=sorted(groups))["SecurityGroups"]
        for rule in group["IpPermissions"]
    ]
    from_outside = [rule for rule in rules if rule.get("IpRanges") or rule.get("Ipv6Ranges")]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in from_outside] == [(22, 22)]
    inside = {pair["GroupId"] for rule in rules for pair in rule["UserIdGroupPairs"]}
    assert inside <= groups
    for node in (head, worker):
        assert node["MetadataOptions"]["HttpTokens"] == "required"


def pod_specs() -> dict[str, dict[str, Any]]:
    cluster = documents("kuberay.yaml")["RayJob"]["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    return {"head": cluster["headGroupSpec"], "worker": workers}


def test_rayjob_has_the_shape_of_its_definition() -> None:
    job = documents("kuberay.yaml")["RayJob"]
    assert job["apiVersion"] == "ray.io/v1"
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert tuple(int(part) for part in cluster["rayVersion"].split(".")) >= (2, 52)
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:2] == ["stillhouse", "run"]
    assert (FOLDER.parent / words[2]).exists()
    for role, group in pod_specs().items():
        template = group["template"]
        (container,) = template["spec"]["containers"]
        assert container["name"] == f"ray-{role}"
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["image"] == f"stillhouse:{PROJECT['version']}"
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        parse(ray_cli, ["start", *(f"--{name}={value}" if value != "true" else f"--{name}" for name, value in group["rayStartParams"].items())])  # fmt: skip


def test_pods_have_no_rights_and_no_callers() -> None:
    for group in pod_specs().values():
        spec = group["template"]["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        (container,) = spec["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "privileged" not in container["securityContext"]
        assert not spec.get("hostNetwork")
    assert pod_specs()["head"]["serviceType"] == "ClusterIP"
    policy = documents("kuberay.yaml")["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    own, operator = policy["ingress"]
    labels = policy["podSelector"]["matchLabels"]
    assert all(group["template"]["metadata"]["labels"] == labels for group in pod_specs().values())
    assert own == {"from": [{"podSelector": {"matchLabels": labels}}]}
    assert operator["ports"] == [{"port": 8265}]
    assert "ipBlock" not in str(policy)


def test_image_installs_the_package_and_drops_root() -> None:
    """It cannot be built here: what is copied exists, what is installed is an extra, and nothing runs as root."""
    lines = (FOLDER / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line.strip() and not line.startswith("#")]
    known = {"FROM", "RUN", "COPY", "USER", "WORKDIR", "ENV", "CMD"}
    assert {word for word, _ in steps} <= known
    assert steps[0][0] == "FROM"
    assert re.fullmatch(r"python:3\.\d+-slim", steps[0][1])
    copied = [word for step, rest in steps if step == "COPY" for word in rest.split()[:-1]]
    assert {"pyproject.toml", "orchestrator", "methods", "configs"} <= set(copied)
    assert all((FOLDER.parent / name).exists() for name in copied)
    (extras,) = re.findall(r"stillhouse\[([a-z0-9,]+)\]", " ".join(lines))
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    users = [index for index, (word, rest) in enumerate(steps) if word == "USER" and rest == "1000"]
    assert users
    assert not [word for word, _ in steps[users[0] :] if word == "RUN"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def status(url: str, **headers: str) -> int | None:
    try:
        return int(urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10).status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


@pytest.mark.slow
def test_tracking_server_asks_who_you_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very command of the template, with its folder and port changed; credentials as the README says."""
    service = read("mlflow.yaml")["services"]["mlflow"]
    words = shlex.split(service["command"])
    options = parse(mlflow_cli, words[1:])
    assert (options["app_name"], options["host"]) == ("basic-auth", "127.0.0.1")
    assert service["network_mode"] == "host"
    port = free_port()
    changed = [word.replace("/mlflow/", f"{tmp_path}/").replace("5000", str(port)) for word in words]
    secret = {
        "MLFLOW_AUTH_ADMIN_PASSWORD": "a password of this test",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "key",
    }
    environment = {**os.environ, **service["environment"], **secret}
    program = str(Path(sys.executable).with_name(changed[0]))
    with (tmp_path / "server.txt").open("wb") as output:
        server = subprocess.Popen([program, *changed[1:]], cwd=tmp_path, env=environment, stdout=output, stderr=output, start_new_session=True)  # fmt: skip
    url = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get?experiment_id=0"
    try:
        deadline = time.monotonic() + 240
        while (found := status(url)) is None:
            assert time.monotonic() < deadline, (tmp_path / "server.txt").read_text()
            assert server.poll() is None, (tmp_path / "server.txt").read_text()
            time.sleep(0.5)
        assert found == 401
        wrong, right = (b64encode(f"admin:{word}".encode()).decode() for word in ("password1234", secret["MLFLOW_AUTH_ADMIN_PASSWORD"]))  # fmt: skip
        assert status(url, Authorization=f"Basic {wrong}") == 401
        assert status(url, Authorization=f"Basic {right}") == 200
        monkeypatch.setenv("HOME", str(tmp_path))
        for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            monkeypatch.delenv(name, raising=False)
        (tmp_path / ".mlflow").mkdir()
        (credentials,) = re.findall(r"```ini\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
        filled = credentials.replace("NAME", "admin").replace(
            "PASSWORD", secret["MLFLOW_AUTH_ADMIN_PASSWORD"]
        )
        client = MlflowClient(f"http://127.0.0.1:{port}")
        with pytest.raises(MlflowException):
            client.search_experiments()
        (tmp_path / ".mlflow" / "credentials").write_text(filled)
        assert [found.name for found in client.search_experiments()] == ["Default"]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
