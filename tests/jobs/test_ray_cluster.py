"""Tasks on a Ray cluster of two nodes on this machine; a worker and then a node are killed."""

import os
import signal
import sys
import time
from contextlib import closing
from pathlib import Path

import job_tasks
import pytest

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.experiment.comparison import compare_scenario, run_comparison
from biscale_env.evaluation.runs.run_view import load_run
from biscale_env.jobs.workers import Workers, in_order, run_each

ray = pytest.importorskip("ray", reason="needs the extra 'ray': pip install 'biscale-env[ray]'")
from ray.cluster_utils import Cluster  # noqa: E402

pytestmark = pytest.mark.slow
TINY = {"duration_s": 20.0, "seeds": 2, "load": 0.5}
WALL_TIMES = r"decision_time|wall|seconds"


@pytest.fixture
def cluster(monkeypatch):
    paths = [str(Path(job_tasks.__file__).parent), *os.environ.get("PYTHONPATH", "").split(":")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*paths, *sys.path]))
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield found
    ray.shutdown()
    found.shutdown()


def test_a_killed_worker_and_a_lost_node_lose_nothing_and_double_nothing(cluster, tmp_path):
    node = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    calls = [(tmp_path, x, 0.5) for x in range(24)]
    found, killed, lost = [], 0, False
    with closing(run_each(job_tasks.square_noted, calls, Workers(1, cluster.address))) as results:
        for number, value in results:
            found.append((number, value))
            if len(found) == 4:
                killed = kill_one_at_work(tmp_path, {k for k, _ in found})
            if len(found) == 10:
                cluster.remove_node(node, allow_graceful=False)
                lost = True
    assert killed
    assert lost
    assert sorted(found) == [(x, x * x) for x in range(24)]
    starts = [int(p.name.split("-")[0]) for p in tmp_path.iterdir()]
    assert set(starts) == set(range(24))
    assert len(starts) > 24  # those that were at work then began again
    with pytest.raises(BiscaleError, match=r"^\d is none$"):
        in_order(job_tasks.refused, [(1,), (2,)], Workers(1, cluster.address))


def kill_one_at_work(folder, finished):
    """Kill the worker of a task that has begun and is not finished; its process id."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for path in folder.iterdir():
            number, pid = map(int, path.name.split("-"))
            if number not in finished:
                os.kill(pid, signal.SIGKILL)
                return pid
        time.sleep(0.02)
    raise AssertionError("nobody is at work")


def test_a_comparison_on_the_cluster_writes_the_same_tables(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = compare_scenario(None, TINY, ["static:900", "slack"], "decode")
    here = load_run(run_comparison(asked, tmp_path / "here", n_jobs=1))
    there = load_run(run_comparison(asked, tmp_path / "there", n_jobs=Workers(1, cluster.address)))
    tables = [
        run.summary().drop(columns=run.summary().filter(regex=WALL_TIMES)) for run in (here, there)
    ]
    assert tables[0].to_csv() == tables[1].to_csv()
    assert here.results["run_id"].tolist() == there.results["run_id"].tolist()


def test_an_address_without_a_cluster_is_a_sentence():
    with pytest.raises(BiscaleError, match=r"--ray 127\.0\.0\.1:1: no cluster there") as told:
        list(run_each(job_tasks.square, [(1,)], Workers(1, "127.0.0.1:1")))
    assert "\n" not in str(told.value)
