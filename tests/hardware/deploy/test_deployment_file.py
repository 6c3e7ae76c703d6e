"""The deployment file: what it means, and the sentence for each way to get it wrong."""

import copy
from pathlib import Path

import pytest
import yaml

from biscale_env.config import list_names
from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.deploy.deployment_file import load_deployment, must_know

PLAIN = {
    "name": "pair",
    "folder": "here",
    "keys": "keys",
    "machines": {
        "a": {"host": "127.0.0.1", "backend": "emulated"},
        "b": {"host": "10.0.0.2", "listen": "0.0.0.0"},
    },
    "instances": {
        "p0": {
            "phase": "prefill",
            "machine": "a",
            "gpus": [0, 1, 2, 3],
            "engine": "http://127.0.0.1:8100",
        },
        "d0": {
            "phase": "decode",
            "machine": "b",
            "gpus": [0, 1, 2, 3, 4, 5, 6, 7],
            "engine": "http://10.0.0.2:8200",
            "instance": {"max_seqs": 128},
            "policy": "static:1200",
        },
    },
    "controllers": "a",
    "slo": "mlperf-server",
}


def written(folder, **changes):
    data = copy.deepcopy(PLAIN)
    for path, value in changes.items():
        *where, last = path.split("__")
        target = data
        for key in where:
            target = target[key]
        if value is None:
            del target[last]
        else:
            target[last] = value
    path = Path(folder) / "d.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def load(folder, **changes):
    return load_deployment(str(written(folder, **changes)))


@pytest.mark.parametrize("name", list_names("deployments"))
def test_shipped_deployments_load(name):
    assert load_deployment(name).name == name


def test_everything_follows_from_the_file(tmp_path):
    d = load(tmp_path)
    assert d.spec("p0").tp == 4
    assert d.spec("d0").tp == 8
    assert d.spec("p0").max_seqs == 256  # vLLM's, not the simulator's
    assert d.spec("d0").max_seqs == 128
    assert {d.spec(name).slo for name in d.instances} == {"mlperf-server"}
    assert (d.policy("p0"), d.policy("d0")) == ("mpc", "static:1200")
    assert d.controlled_by("a") == ["p0", "d0"]
    assert d.on_machine("b") == ["d0"]
    assert d.backend("a") == f"fake:{tmp_path / 'here' / 'a' / 'gpus'}"
    assert d.backend("b") == "nvml"
    assert d.records("p0").startswith("ipc://")
    assert d.records("d0") == "tcp://127.0.0.1:20602"
    assert d.listens("b", d.address("b", "commands")) == "tcp://0.0.0.0:20510"
    assert d.engine_environment("d0")["BISCALE_KEYS"] == str(tmp_path / "keys" / "b")
    assert d.engine_environment("d0")["BISCALE_KEYS_PEER"] == "a"
    assert "BISCALE_KEYS" not in d.engine_environment("p0")
    with pytest.raises(BiscaleError, match="no machine 'c'; known: a, b"):
        must_know(d, "c")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"machine": {}}, "unknown key 'machine'; the nearest known key is 'machines'"),
        ({"instances__p0__machine": "c"}, "is on machine 'c'; known: a, b"),
        ({"instances__d0__machine": "a"}, "GPU 0 of machine 'a' is in 2 instances"),
        ({"instances__d0": None}, "needs prefill and decode instances"),
        ({"instances__p0__phase": "both"}, "'instances.p0.phase' = 'both'"),
        ({"instances__p0__gpus": []}, "instances.p0.gpus"),
        ({"instances__p0__engine": "127.0.0.1:8100"}, "instances.p0.engine"),
        ({"instances__p0__instance": {"tpp": 3}}, "instance 'p0'"),
        ({"controllers": "c"}, "neither 'beside' nor a machine"),
        ({"keys": None}, "machine 'b' at 10.0.0.2 is reached without keys"),
        ({"machines__a__status_port": 20510}, "tcp://127.0.0.1:20510 is given to 2 listeners"),
        ({"router": {"url": "http://127.0.0.1:8100"}}, "tcp://127.0.0.1:8100 is given to 2"),
        ({"router": {"prefill": "cache_aware"}}, "router.prefill"),
        ({"bounds": {"lease_s": 60}}, "bounds.lease_s"),
        ({"tier1": {"adapter": "kubernetes"}}, "needs workloads.prefill"),
        ({"instances": {"Upper-Case": PLAIN["instances"]["p0"]}}, "name 'Upper-Case'"),
        ({"policies": {"prefil": "mpc"}}, "policies"),
        ({"slo": "biscal"}, None),
    ],
)
def test_mistakes_are_named(tmp_path, changes, sentence):
    path = written(tmp_path, **changes)
    if sentence is None:  # what an SLO is called is found out where it is loaded
        assert load_deployment(str(path)).instance.slo == "biscal"
        return
    with pytest.raises(BiscaleError) as error:
        load_deployment(str(path))
    assert sentence.lower() in str(error.value).lower()
    assert str(path) in str(error.value)


def test_without_keys_everything_stays_on_loopback(tmp_path):
    d = load(tmp_path, keys=None, machines__b={"host": "127.0.0.2"})
    assert d.key_folder("a") is None
    assert not any(machine.needs_keys for machine in d.machines.values())


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(BiscaleError, match="emulated-two-machines"):
        load_deployment("emulated-two-machine")
