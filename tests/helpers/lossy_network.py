"""Two hosts in Linux network namespaces, and a wire between them that can lose, delay and be cut.

The wire is this file run as a process: it carries IP packets between two TUN devices, so that TCP
retransmits and waits as on a bad network. (The kernel's own netem is not everywhere.)
"""

import contextlib
import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
CLONE_NEWNET = 0x40000000  # linux/sched.h
HOSTS = ("10.77.0.1", "10.77.0.2")
MINE = f"biscale-{os.getpid()}"  # another run of the tests has namespaces of its own


def why_not() -> str:
    """Why there can be no namespaces here; empty where there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    if not shutil.which("ip") or not Path("/dev/net/tun").exists():
        return "network namespaces need `ip` and /dev/net/tun"
    tried = subprocess.run(["ip", "netns", "add", f"{MINE}-try"], capture_output=True)
    subprocess.run(["ip", "netns", "del", f"{MINE}-try"], capture_output=True)
    return "" if tried.returncode == 0 else "no network namespace can be made here"


class LossyNetwork:
    """Namespaces ``a`` and ``b`` with the addresses of :data:`HOSTS`."""

    def __init__(self, folder: Path) -> None:
        self.control = folder / "wire.json"
        self.shape()
        for name, host in zip("ab", HOSTS, strict=True):
            space = f"{MINE}-{name}"
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
            for command in (
                f"ip netns add {space}",
                f"ip netns exec {space} ip tuntap add dev wire mode tun",
                f"ip -n {space} addr add {host}/24 dev wire",
                f"ip -n {space} link set wire up",
                f"ip -n {space} link set lo up",
            ):
                subprocess.run(command.split(), check=True)
        command = [sys.executable, __file__, str(self.control), MINE]
        self.wire = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.wire.stdout.readline() == "wire ready\n"

    def shape(self, loss: float = 0.0, delay_s: float = 0.0, cut: bool = False) -> None:
        """What the wire does from now on, in both directions."""
        new = self.control.with_suffix(".new")
        new.write_text(json.dumps({"loss": loss, "delay_s": delay_s, "cut": cut}))
        new.replace(self.control)

    @staticmethod
    def within(name: str) -> tuple[str, ...]:
        """What to put before a command, so that it runs on host ``a`` or ``b``."""
        return ("ip", "netns", "exec", f"{MINE}-{name}")

    def close(self) -> None:
        """Take it all down."""
        self.wire.kill()
        self.wire.wait()
        self.wire.stdout.close()
        for name in "ab":
            subprocess.run(["ip", "netns", "del", f"{MINE}-{name}"], capture_output=True)


def _device(space: str) -> int:
    """Descriptor of the TUN device of a namespace; this process ends up in it."""
    with Path(f"/var/run/netns/{space}").open() as handle:
        if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH", b"wire", IFF_TUN | IFF_NO_PI))
    return tun


def carry(control: Path, spaces: str) -> None:
    """Carry packets until killed."""
    ends = [_device(f"{spaces}-{name}") for name in "ab"]
    print("wire ready", flush=True)
    waiting: list[tuple[float, int, int, bytes]] = []
    rng, count, looked_s, shape = random.Random(0), 0, 0.0, {}
    while True:
        now = time.monotonic()
        if now - looked_s > 0.02:
            looked_s = now
            with contextlib.suppress(OSError, ValueError):
                shape = json.loads(control.read_text())
        while waiting and waiting[0][0] <= now:
            _, _, to, packet = heapq.heappop(waiting)
            with contextlib.suppress(OSError):
                os.write(ends[to], packet)
        pause_s = min(waiting[0][0] - now if waiting else 0.02, 0.02)
        for end in select.select(ends, [], [], max(pause_s, 0.0))[0]:
            with contextlib.suppress(OSError):
                packet = os.read(end, 65536)
                if not shape["cut"] and rng.random() >= shape["loss"]:
                    count += 1
                    due_s = time.monotonic() + shape["delay_s"]
                    heapq.heappush(waiting, (due_s, count, 1 - ends.index(end), packet))


if __name__ == "__main__":
    carry(Path(sys.argv[1]), sys.argv[2])
