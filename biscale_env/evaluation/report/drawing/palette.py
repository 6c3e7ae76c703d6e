"""One colour, dash and marker per policy, the same in every figure.

Colours after Okabe and Ito (2008).

Colour alone never carries the meaning: members of one family (``mpc``, ``mpc-fast``) share a hue
and differ in dash and marker, and every hue has a lighter twin for dark pages.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

INK: Final = "#1f2430"
MUTED: Final = "#697080"
GRID: Final = "#e4e7ed"
LIMIT: Final = "#b3261e"
"""The SLO line."""

DARK: Final = {INK: "#e8eaf0", MUTED: "#9aa3b2", GRID: "#2c323d", LIMIT: "#ff8a80"}

_FAMILIES: Final = {
    "max": ("#6f7785", "#a3abb8"),
    "static": ("#c0629a", "#eaa4cc"),
    "slack": ("#d55e00", "#ff9550"),
    "mpc": ("#0072b2", "#5db4f0"),
    "oracle": ("#00875f", "#3fd6a8"),
    "ecofreq": ("#d69200", "#ffc655"),
    "throttllem": ("#2fa3dc", "#92d6fa"),
    "greenllm": ("#7d6b12", "#d3c05a"),
    "dynamollm": ("#7448b0", "#b99bee"),
    "agft": ("#a3243f", "#f47f97"),
    "random": ("#4d4d4d", "#cfcfcf"),
}
_OTHERS: Final = (
    ("#0d7a86", "#5fd0dc"),
    ("#5a7d00", "#b4dc55"),
    ("#9c4a8c", "#e39ad6"),
    ("#8a5a2b", "#e0ae7c"),
)
DASHES: Final = ("solid", "dash", "dot", "dashdot", "longdash")
_SYMBOLS: Final = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")


class Style(NamedTuple):
    """How a policy is drawn."""

    color: str
    dark: str
    dash: str
    symbol: str


def family(policy: str) -> str:
    """The known family that a policy's name starts with, else the name itself."""
    stem = policy.lower()
    known = [
        name
        for name in _FAMILIES
        if stem == name or stem.startswith((f"{name}-", f"{name}_", f"{name} "))
    ]
    return max(known, key=len) if known else stem


def styles(policies: Sequence[str]) -> dict[str, Style]:
    """A style for each policy; a set of policies gets the same ones whatever its order."""
    names = sorted(set(policies))
    unknown = [name for name in names if family(name) not in _FAMILIES]
    members: dict[str, int] = {}
    found = {}
    for name in names:
        kin = family(name)
        rank = members[kin] = members.get(kin, -1) + 1
        if kin in _FAMILIES:
            place = list(_FAMILIES).index(kin)
            color, dark = _FAMILIES[kin]
        else:
            place = rank = unknown.index(name)
            color, dark = _OTHERS[place % len(_OTHERS)]
            rank = place // len(_OTHERS)
        found[name] = Style(
            color, dark, DASHES[rank % len(DASHES)], _SYMBOLS[(place + rank) % len(_SYMBOLS)]
        )
    return found


def dark_twins(used: Sequence[Style]) -> dict[str, str]:
    """Every light colour of a page with its twin for dark pages."""
    return DARK | {style.color: style.dark for style in used}
