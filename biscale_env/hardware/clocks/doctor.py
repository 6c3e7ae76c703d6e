"""What will work on this machine, what will not, and why."""

import importlib.metadata
import importlib.util
import math
import os
import time
import urllib.error
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.clocks import owner
from biscale_env.hardware.clocks.backend import ClockBackend, ClockError, reason_text
from biscale_env.hardware.clocks.backend_registry import open_backend
from biscale_env.hardware.engines.hook.versions import ENGINES, version_note
from biscale_env.hardware.engines.http_access import KEY_HINT, base_url, read_url

Status = Literal["ok", "warn", "fail"]
CAP_SYS_ADMIN = 21  # bit of CapEff, linux/capability.h
PACKAGES = {
    "nvidia-ml-py": "pynvml",
    "pyzmq": "zmq",
    "msgspec": "msgspec",
    "aiohttp": "aiohttp",
    "httpx-sse": "httpx_sse",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    status: Status
    subject: str
    text: str


def has_sys_admin() -> bool:
    """Whether this process has the capability that NVML asks for when clocks are locked."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> CAP_SYS_ADMIN & 1)
    except (OSError, ValueError):
        pass
    return os.geteuid() == 0


def check_packages() -> list[Finding]:
    """The packages of the extra, and the engines beside them."""
    found = []
    for package, module in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            found.append(Finding("fail", package, "not installed: pip install 'biscale-env[hw]'"))
        else:
            found.append(Finding("ok", package, importlib.metadata.version(package)))
    for engine in ENGINES:
        try:
            version = importlib.metadata.version(engine)
        except importlib.metadata.PackageNotFoundError:
            continue
        note = version_note(engine, version)
        found.append(
            Finding("warn" if note else "ok", engine, f"{version}{': ' + note if note else ''}")
        )
    return found


def check_gpu(backend: ClockBackend, uuid: str) -> list[Finding]:
    """One GPU: clocks, how long reading takes, what holds it down, what is unusual about it."""
    started = time.monotonic()
    reading, energy_j = backend.read(uuid), backend.energy_j(uuid)
    took_s = time.monotonic() - started
    try:
        clocks = backend.supported_mhz(uuid)
        span = f"of {clocks[0]:g} to {clocks[-1]:g} ({len(clocks)} clocks)"
        found = []
    except ClockError as error:
        span = "of unknown ones"
        found = [Finding("warn", uuid, f"its clock cannot be set ({error}): use --observe-only")]
    values = {
        "clock": (reading.freq_mhz, f"{reading.freq_mhz:g} MHz {span}"),
        "power": (reading.power_w, f"{reading.power_w:.0f} W"),
        "temperature": (reading.temperature_c, f"{reading.temperature_c:g} C"),
        "energy counter": (energy_j, ""),
    }
    known = ", ".join(text for value, text in values.values() if text and math.isfinite(value))
    lacks = [name for name, (value, _) in values.items() if not math.isfinite(value)]
    text = (
        f"{known}, held down by: {reason_text(reading.reasons)}; read in {took_s * 1e3:.1f} ms"
        + (f"; the driver does not tell: {', '.join(lacks)}" if lacks else "")
    )
    found.insert(0, Finding("warn" if reading.throttled or lacks else "ok", uuid, text))
    notes = list(getattr(backend, "peculiarities", lambda _: [])(uuid))
    if getattr(backend, "persistence", lambda _: None)(uuid) is False:
        notes.append(
            "persistence mode is off: an unloading driver drops the lock; "
            "the actuator keeps the driver open meanwhile"
        )
    return found + [Finding("warn", uuid, note) for note in notes]


def check_clocks(name: str) -> list[Finding]:
    """Backend, privilege, GPUs, orphans."""
    try:
        backend = open_backend(name)
    except BiscaleError as error:
        hint = "; to try everything without a GPU: `biscale hw emulate`" if name == "nvml" else ""
        return [Finding("fail", f"backend {name}", f"{error}{hint}")]
    with backend:
        found = [Finding("ok", f"backend {name}", f"{len(backend.devices())} GPUs")]
        for device in backend.devices():
            try:
                found += check_gpu(backend, device.uuid)
            except BiscaleError as error:
                found.append(Finding("fail", device.uuid, str(error)))
        for index, reason in backend.unreachable().items():
            found.append(Finding("fail", f"GPU {index}", reason))
        if backend.name == "nvml":
            allowed = has_sys_admin()
            text = (
                "clocks can be locked"
                if allowed
                else "NVML locks clocks only for root or with CAP_SYS_ADMIN"
            )
            hint = (
                ""
                if allowed
                else "; use sudo for `biscale hw actuate`, or --backend zeusd, or --observe-only"
            )
            found.append(Finding("ok" if allowed else "warn", "privilege", text + hint))
    return found


def check_owners() -> list[Finding]:
    """Owners and orphans of clocks."""
    left = owner.orphans()
    living = [
        Finding("ok", uuid, "its clock has a living owner")
        for uuid in owner.recorded()
        if uuid not in left
    ]
    text = "an earlier run died and may have left the clock locked: run `biscale hw restore`"
    return living + [Finding("warn", uuid, text) for uuid in left]


def check_endpoint(url: str, timeout_s: float = 3.0, api_key: str | None = None) -> Finding:
    """An engine: does it answer, with which version, with which metrics."""
    base = base_url(url)
    try:
        read_url(f"{base}/v1/models", timeout_s, api_key)
        metrics = read_url(f"{base}/metrics", timeout_s, api_key)
    except urllib.error.HTTPError as error:
        hint = f": {KEY_HINT}" if error.code in (401, 403) else ""
        return Finding("warn", url, f"answers {error.code} at {error.url}{hint}")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return Finding(
            "fail", url, f"does not answer ({reason}): start the engine, or correct the address"
        )
    kinds = [kind for kind in ("biscale_emulated:", "vllm:", "sglang:") if kind in metrics]
    return Finding(
        "ok", url, f"answers; metrics of {kinds[0].rstrip(':') if kinds else 'an unknown engine'}"
    )


def examine(
    backend: str, endpoints: Sequence[str] = (), api_key: str | None = None
) -> list[Finding]:
    """Everything; changes nothing on the machine."""
    return [
        *check_packages(),
        *check_clocks(backend),
        *check_owners(),
        *(check_endpoint(url, api_key=api_key) for url in endpoints),
    ]
