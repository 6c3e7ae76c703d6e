"""An emulated deployment of two machines with all its processes, for the slow tests."""

import contextlib
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import yaml
from hardware_helpers import free_port, gpus_of, read_until, spawn, wait_until

LEASE_S = 1.0


class DeploymentLab:
    """Machines ``a`` and ``b``; all controllers on ``a``, so that ``b`` is reached over TCP.

    Each command runs as processes of its own; ``before`` is put in front of a machine's commands,
    e.g. to enter a network namespace.
    """

    def __init__(self, hosts=("127.0.0.1", "127.0.0.2"), before=None, **changes):
        self.folder = Path(tempfile.mkdtemp(prefix="bd-"))  # short: socket paths are bounded
        self.before = before or {}
        self.file = self.folder / "d.yaml"
        self.processes = {}
        router = free_port()
        ports = {machine: [free_port(), free_port()] for machine in "ab"}
        engines = {
            f"{phase}_{k}": (phase, machine, host, ports[machine][j], j)
            for k, (machine, host) in enumerate(zip("ab", hosts, strict=True))
            for j, phase in enumerate(("prefill", "decode"))
        }
        self.description = {
            "name": "lab",
            "folder": str(self.folder / "x"),
            "keys": str(self.folder / "k"),
            "machines": {
                machine: {
                    "host": host,
                    "backend": "emulated",
                    "commands_port": free_port(),
                    "status_port": free_port(),
                    "feed_port": free_port(),
                    "records_port": free_port(8),
                }
                for machine, host in zip("ab", hosts, strict=True)
            },
            "instances": {
                name: {
                    "phase": phase,
                    "machine": machine,
                    "gpus": list(range(4 * j, 4 * j + 4)),
                    "engine": f"http://{host}:{port}",
                }
                for name, (phase, machine, host, port, j) in engines.items()
            },
            # in turn: which instance a request goes to does not hang on milliseconds, so that short
            # runs can be compared with the cluster simulator
            "router": {
                "url": f"http://{hosts[0]}:{router}",
                "prefill": "round_robin",
                "decode": "round_robin",
            },
            "policies": {"prefill": "static:1200", "decode": "slack"},
            "controllers": "a",
            "bounds": {"lease_s": LEASE_S, "delay_s": 0.05},
            **changes,
        }
        self.file.write_text(yaml.safe_dump(self.description, sort_keys=False))
        self.env = {"BISCALE_HW_STATE": str(self.folder / "owned"), "COLUMNS": "200"}
        self.run("hw", "keys", str(self.file))

    def start(self, name, *arguments, machine="a"):
        env = {**self.env, "BISCALE_HW_STATE": str(self.folder / f"owned-{machine}")}
        self.processes[name] = spawn(
            *arguments, env=env, before=self.before.get(machine, ()), start_new_session=True
        )
        return self.processes[name]

    def run(self, *arguments, machine="a", timeout_s=300, code=0):
        process = self.start(f"run {arguments[:2]}", *arguments, machine=machine)
        out, err = process.communicate(timeout=timeout_s)
        assert process.returncode == code, out + err
        return out + err

    def emulate(self):
        read_until(self.start("emulate", "hw", "emulate", str(self.file)), "is emulated")
        return self

    def up(self, machine):
        arguments = ["hw", "up", str(self.file), "--machine", machine]
        process = self.start(f"up {machine}", *arguments, machine=machine)
        read_until(process, f"machine {machine} is up")
        return process

    def children(self, name):
        """Command lines of the children of one of our processes, by process id."""
        found = {}
        pid = self.processes[name].pid
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):
                if f"\nPPid:\t{pid}\n" in status.read_text():
                    line = (status.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found[int(status.parent.name)] = line
        return found

    def child(self, name, words):
        """The one child whose command line ends with some words."""
        (pid,) = [p for p, line in self.children(name).items() if words in line]
        return pid

    def locked(self, machine):
        return int(gpus_of(self.folder / "x" / machine / "gpus")["locked"].sum())

    def until_locked(self, machine, count, timeout_s=20.0):
        return wait_until(lambda: self.locked(machine) == count, timeout_s)

    def stop(self, name):
        process = self.processes.pop(name)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        return process.returncode, out + err

    def close(self):
        for name in reversed(list(self.processes)):
            process = self.processes[name]
            if process.poll() is None:
                process.terminate()
                end = time.monotonic() + 30
                while process.poll() is None and time.monotonic() < end:
                    time.sleep(0.05)
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
            process.stderr.close()
        shutil.rmtree(self.folder, ignore_errors=True)
