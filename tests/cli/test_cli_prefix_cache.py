"""``--prefix-cache`` of the commands: what is used is said, `off` is as without hashes."""

import json
import sys

import numpy as np
import pytest

from biscale_env import cli
from biscale_env.evaluation.experiment.comparison import compare_scenario
from biscale_env.evaluation.rollouts.scenarios import resolve


@pytest.fixture
def biscale(monkeypatch, capsys):
    """Run a command; gives exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["biscale", *(str(a) for a in arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A trace of chats in Mooncake's form, and the same without hashes."""
    rng = np.random.default_rng(0)
    folder, rows, chats = tmp_path_factory.mktemp("traces"), [], {}
    for k in range(600):
        chat = int(rng.integers(0, 150))
        known = chats.get(chat, [])
        ids = [*known, *range(1000 * k, 1000 * k + int(rng.integers(1, 4)))]
        chats[chat] = ids if len(ids) < 12 else []
        rows.append(
            {"timestamp": 1000 * k, "input_length": 512 * len(ids), "output_length": 20,
             "hash_ids": ids}
        )  # fmt: skip
    shared = folder / "chats.jsonl"
    shared.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = folder / "plain" / "chats.jsonl"
    plain.parent.mkdir()
    for row in rows:
        del row["hash_ids"]
    plain.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return shared, plain


@pytest.fixture
def capacity(biscale):
    def run(*arguments):
        code, out, err = biscale("capacity", "prefill", *arguments)
        assert code == 0, err
        return out

    return run


def test_what_is_used_is_said_and_the_default_follows_from_the_trace(files, capacity):
    shared, plain = files
    assert "prefix cache: lru, the KV room of each prefill instance" in capacity("--trace", shared)
    assert "prefix cache: off, since chats does not say" in capacity("--trace", plain)
    asked = capacity("--trace", shared, "--prefix-cache", "lru:5000")
    assert "prefix cache: lru, 5,000 tokens of each prefill instance" in asked
    assert "prefix cache: off\n" in capacity("--trace", shared, "--prefix-cache", "off")


def test_the_capacity_rises_with_the_cache_and_off_is_as_without_hashes(files, capacity):
    shared, plain = files
    rates = {}
    for rule in ("off", "lru:3000", "infinite"):
        told = json.loads(capacity("--trace", shared, "--prefix-cache", rule, "--json"))
        rates[rule] = told["capacity_rps"]
    assert rates["off"] < rates["lru:3000"] < rates["infinite"]
    assert json.loads(capacity("--trace", plain, "--json"))["capacity_rps"] == rates["off"]


@pytest.mark.parametrize("rule", ["on", "lru:", "lru:0", "lru:-5", "lru:1.5", "LRU", "off:3"])
def test_another_rule_is_refused_in_one_sentence(files, rule, biscale):
    code, _, err = biscale("capacity", "prefill", "--trace", files[0], "--prefix-cache", rule)
    assert code == 2
    assert err.count("\n") == 1
    assert "a prefix cache is off, lru, lru:<tokens> or infinite" in err


def test_a_comparison_runs_on_the_same_requests_for_every_policy(files):
    shared, plain = files
    asked = {"trace": str(shared), "prefix_cache": "infinite", "load": 0.5}
    point = compare_scenario(None, asked, ["max"], "prefill").points[0]
    case = resolve(point, "prefill")
    assert case.plant.settings.instance.prefix_cache == "infinite"
    assert case.workload(0).blocks is not None
    off = compare_scenario(None, {**asked, "prefix_cache": "off"}, ["max"], "prefill").points[0]
    without = compare_scenario(None, {"trace": str(plain), "load": 0.5}, ["max"], "prefill")
    cases = [resolve(off, "prefill"), resolve(without.points[0], "prefill")]
    assert cases[0].workload(0) == cases[1].workload(0)


@pytest.mark.parametrize("command", ["compare", "capacity", "place", "train", "reproduce paper"])
def test_the_commands_have_the_option(command, biscale):
    assert "--prefix-cache" in biscale(*command.split(), "--help")[1]
