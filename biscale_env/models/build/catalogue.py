"""What models there are and what they rest on: `biscale models list` and `describe`."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biscale_env.core.errors import BiscaleError
from biscale_env.models.coefficient_files import (
    ModelFile,
    files_in,
    find_folder,
    known_names,
    read_model_file,
    stem,
)
from biscale_env.models.gpu_layer import GpuLayer, ensemble_path, layer_files, layer_path


@dataclass(frozen=True)
class Entry:
    """One model family at a glance.

    Attributes:
        name: of the family.
        configurations: number format and parallel degrees, e.g. ``bf16-tp4``.
        prefill_error: largest held-out mean error of its prefill files; None where none is told.
        decode_error: of its decode files.
        estimated_share: largest share of kernel time that is not measured.
        kernels: where kernel times are from, a word: ``measured``, ``estimates`` or ``roofline``.
        power: where the GPU's layer is from: ``fitted`` or ``borrowed``, and from what.
    """

    name: str
    configurations: tuple[str, ...]
    prefill_error: float | None
    decode_error: float | None
    estimated_share: float
    kernels: str
    power: str


def configuration(content: ModelFile) -> str:
    """A file's configuration, without its phase."""
    return stem("", content.dtype, content.tp, content.ep).lstrip("-")


def family_contents(name: str) -> list[tuple[Path, ModelFile]]:
    """Coefficient files of a family.

    Raises:
        BiscaleError: no such family, or nothing in it.
    """
    folder = find_folder(name)
    paths = [Path(name)] if folder is None else files_in(folder)
    if not paths:
        raise BiscaleError(f"model '{name}' has no coefficient file such as prefill-bf16-tp4.yaml")
    return [(path, read_model_file(path)) for path in paths]


def _layer(path: Path, content: ModelFile) -> GpuLayer | None:
    found = layer_path(content.gpu, path.parent)
    return None if found is None else layer_files(found).layer()


def _power_of(layer: GpuLayer | None) -> str:
    if layer is None:
        return "none of its own"
    if lender := layer.fit.get("borrowed_from"):
        return f"borrowed from {lender}"
    servers, kernels = len(layer.fit.get("servers", [])), layer.fit.get("kernels", 0)
    return f"fitted to {kernels} kernels, {servers} servers" if kernels or servers else "assumed"


def _kernels_of(contents: list[ModelFile], share: float) -> str:
    times = {c.coefficients["weights_s"].provenance for c in contents}
    if "assumed" in times:
        return "roofline"
    return "estimates" if share >= 0.5 else "measured"


def entry(name: str) -> Entry:
    """One family at a glance.

    Raises:
        BiscaleError: no such family, or a file that cannot be read.
    """
    pairs = family_contents(name)
    contents = [content for _, content in pairs]
    errors: dict[str, list[float]] = {"prefill": [], "decode": []}
    for content in contents:
        if (error := content.fit.get("held_out_mape")) is not None:
            errors[content.phase].append(float(error))
    share = max(float(c.fit.get("estimated_share", 0.0)) for c in contents)
    return Entry(
        name=name,
        configurations=tuple(dict.fromkeys(configuration(c) for c in contents)),
        prefill_error=max(errors["prefill"], default=None),
        decode_error=max(errors["decode"], default=None),
        estimated_share=share,
        kernels=_kernels_of(contents, share),
        power=_power_of(_layer(*pairs[0])),
    )


def catalogue() -> list[Entry]:
    """Every shipped family."""
    return [entry(name) for name in known_names()]


@dataclass(frozen=True)
class Description:
    """All that is known about one family.

    Attributes:
        entry: at a glance.
        files: one row per coefficient file: phase, configuration, errors, points, domain, members.
        coefficients: one row per coefficient of one file: name, value, provenance, source.
        shown: the file that they are of.
        layer: what the GPU's layer was fitted to; empty without one.
        assumed: names of the coefficients that are assumed.
    """

    entry: Entry
    files: list[dict[str, Any]]
    coefficients: list[dict[str, Any]]
    shown: str
    layer: dict[str, Any]
    assumed: list[str]


def describe(name: str, which: str | None = None) -> Description:
    """Describe a family.

    Args:
        name: of the family, or its folder.
        which: file whose coefficients are told, e.g. ``decode-bf16-tp4``; None: the first of
            decode.

    Raises:
        BiscaleError: no such family or file.
    """
    pairs = family_contents(name)
    by_stem = {path.stem: (path, content) for path, content in pairs}
    shown = which or next((s for s in by_stem if s.startswith("decode")), pairs[0][0].stem)
    if shown not in by_stem:
        raise BiscaleError(f"model '{name}' has no file '{shown}'; it has: {', '.join(by_stem)}")
    path, content = by_stem[shown]
    layer = _layer(path, content)
    borrowed = {} if layer is None else layer.for_phase(content.phase, content.dtype)
    rows = [{"name": n, **c.model_dump()} for n, c in {**borrowed, **content.coefficients}.items()]
    return Description(
        entry=entry(name),
        files=[_file_row(p, c) for p, c in pairs],
        coefficients=rows,
        shown=shown,
        layer={} if layer is None else {"gpu": layer.gpu, **layer.fit},
        assumed=[r["name"] for r in rows if r["provenance"] == "assumed"],
    )


def _file_row(path: Path, content: ModelFile) -> dict[str, Any]:
    members = ensemble_path(path)
    lines = members.read_text(encoding="utf-8").splitlines() if members.is_file() else []
    keys = ("train_points", "held_out_points", "held_out_mape", "held_out_max_error")
    provenance = Counter(c.provenance for c in content.coefficients.values())
    return {
        "phase": content.phase,
        "configuration": configuration(content),
        **{key: content.fit.get(key) for key in keys},
        "estimated_share": content.fit.get("estimated_share"),
        "members": max(sum(not line.startswith("#") for line in lines) - 1, 0),
        "provenance": dict(provenance),
        "domain": dict(content.box),
    }
