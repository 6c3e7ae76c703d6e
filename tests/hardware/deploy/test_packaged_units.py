"""Unit files and manifests: linted, least privilege, and true to the commands they call."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from biscale_env.cli import build
from biscale_env.config.loader import validate
from biscale_env.hardware.deploy.deployment_file import Deployment

PACKAGING = Path(__file__).resolve().parents[3] / "packaging"
UNITS = sorted((PACKAGING / "systemd").glob("*.service"))
MANIFESTS = sorted((PACKAGING / "kubernetes").glob("*.yaml"))


def documents():
    return [doc for path in MANIFESTS for doc in yaml.safe_load_all(path.read_text())]


def of_kind(kind):
    (found,) = [doc for doc in documents() if doc["kind"] == kind]
    return found


def must_exist(words):
    """A ``biscale`` command line names a command and options that there are."""
    command, words = typer.main.get_command(build()), list(words)
    while words and hasattr(command, "commands") and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    assert not hasattr(command, "commands"), words
    known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= known


def test_there_are_some():
    assert len(UNITS) == 2
    assert len(MANIFESTS) == 3


@pytest.mark.parametrize("path", UNITS, ids=lambda p: p.name)
def test_systemd_finds_nothing_wrong(path, tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze here")
    text = path.read_text().replace("/opt/biscale/bin/biscale", shutil.which("true"))
    (tmp_path / path.name).write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / path.name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    ours = [line for line in done.stderr.splitlines() if path.name in line]
    assert not ours, ours


def test_systemd_would_have_found_a_mistake(tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze here")
    bad = UNITS[0].read_text().replace("RestartSec=1", "RestartSec=one")
    (tmp_path / "bad.service").write_text(bad.replace("/opt/biscale/bin/biscale", "/bin/true"))
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "bad.service")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "bad.service" in done.stderr


@pytest.mark.parametrize("path", UNITS, ids=lambda p: p.name)
def test_units_call_commands_that_exist(path):
    for line in re.findall(r"^Exec\w+=(.*)$", path.read_text(), flags=re.M):
        words = line.split()
        assert words[0] == "/opt/biscale/bin/biscale"
        must_exist(words[1:])


def test_the_unit_of_the_actuator_has_one_capability_and_keeps_its_journal():
    text = (PACKAGING / "systemd" / "biscale-up.service").read_text()
    assert re.findall(r"^CapabilityBoundingSet=(.*)$", text, flags=re.M) == ["CAP_SYS_ADMIN"]
    assert "RuntimeDirectoryPreserve=yes" in text
    assert "BISCALE_HW_STATE=/run/biscale-env" in text
    assert "hw restore" in text


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.name)
def test_manifests_follow_the_schemas_of_kubernetes(path):
    linter = pytest.importorskip(
        "kubernetes_validate", reason="pip install kubernetes-validate to lint the manifests"
    )
    for document in yaml.safe_load_all(path.read_text()):
        linter.validate(document, "1.32", strict=True)


def test_containers_have_the_privilege_they_need_and_no_more():
    daemons, engine = of_kind("DaemonSet"), of_kind("StatefulSet")
    (actuator,) = daemons["spec"]["template"]["spec"]["containers"]
    assert actuator["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["SYS_ADMIN"]}
    assert "privileged" not in actuator["securityContext"]
    controller = engine["spec"]["template"]["spec"]["containers"][1]
    assert controller["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    for pod in (daemons, engine):
        spec = pod["spec"]["template"]["spec"]
        assert spec["automountServiceAccountToken"] is False
        volumes = {volume["name"] for volume in spec["volumes"]}
        for container in spec["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        labels = pod["spec"]["template"]["metadata"]["labels"]
        assert pod["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_containers_call_commands_that_exist_on_a_deployment_that_loads():
    text = of_kind("ConfigMap")["data"]["deployment.yaml"]
    deployment = validate(yaml.safe_load(text), Deployment, "the ConfigMap")
    for pod in (of_kind("DaemonSet"), of_kind("StatefulSet")):
        for container in pod["spec"]["template"]["spec"]["containers"]:
            if "command" in container:
                must_exist([*container["command"][1:], *container["args"]])
    engine, controller = of_kind("StatefulSet")["spec"]["template"]["spec"]["containers"]
    told = {e["name"]: e["value"] for e in engine["env"]}
    assert told == deployment.engine_environment("decode_0")
    assert controller["args"][-1] in deployment.instances
