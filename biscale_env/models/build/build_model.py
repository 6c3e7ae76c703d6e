"""`biscale models build`: from a name or a `config.json` to a folder of coefficients."""

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

from biscale_env.config import Gpu, Llm, list_names, load_gpu, load_llm
from biscale_env.config.hardware import Dtype
from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import write_whole
from biscale_env.models.build.borrowed_layer import borrowed_layer, layer_texts_of
from biscale_env.models.build.kernel_tables import KernelTable, kernel_table
from biscale_env.models.build.llm_names import find_llm
from biscale_env.models.build.partition import Partition, check_partition
from biscale_env.models.build.roofline import roofline_table
from biscale_env.models.build.shipped_tables import table_text
from biscale_env.models.build.table_package import SYSTEMS, tables_installed
from biscale_env.models.coefficient import dump_fitted
from biscale_env.models.coefficient_files import ModelFile, parse_model_file
from biscale_env.models.fit.kernel_profiles import cut
from biscale_env.models.fit.llm_files import OnGpu, Source, fit_tables
from biscale_env.models.fit.profile_table import read_profile
from biscale_env.models.gpu_layer import layer_files, layer_path

KERNELS: Final = "kernels.csv"


@dataclass(frozen=True)
class BuiltModel:
    """A built family.

    Attributes:
        family: its name, ``<gpu>/<llm>``.
        files: file name to text, ready to be written into one folder.
        contents: the coefficient files, parsed.
        source: where the kernel times are from.
        measured: from measured kernels; else counted.
        borrowed: the GPU's own layer is borrowed from another GPU.
    """

    family: str
    files: dict[str, str]
    contents: tuple[ModelFile, ...]
    source: str
    measured: bool
    borrowed: bool


def build_model(
    llm: str,
    gpu: str,
    degrees: Sequence[int],
    ep: int = 1,
    dtype: Dtype | None = None,
    roofline: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> BuiltModel:
    """Build the model of an LLM on a GPU.

    Args:
        llm: what :func:`~biscale_env.models.build.llm_names.find_llm` takes.
        gpu: name of a GPU description or its YAML file.
        degrees: TP degrees, one configuration each.
        ep: expert groups of every configuration.
        dtype: number format; None: the one that the LLM is published in.
        roofline: count kernel times even where there are measured ones.
        progress: told what happens.

    Raises:
        BiscaleError: an unknown LLM or GPU, an LLM that cannot be spread like this or does not fit,
            or kernels that the tables do not have.
    """
    found, on_what = find_llm(llm), load_gpu(gpu)
    parts = [Partition(dtype or found.dtype, tp, ep) for tp in degrees]
    for part in parts:
        check_partition(found, on_what, part)
    counted = roofline or not tables_installed() or on_what.name not in SYSTEMS
    if counted:
        tables = [roofline_table(found, on_what, part) for part in parts]
    else:
        tables = [kernel_table(found, on_what, part, progress) for part in parts]
    path = layer_path(gpu)
    layer = borrowed_layer(on_what) if path is None else layer_files(path)
    text = table_text(on_what.name, found.name, tables)
    progress("fitting")
    own = _fitted(found, OnGpu(on_what, layer, {}), tables, text)
    files = _described(own, found, on_what, shipped_gpu=path is not None and not Path(gpu).suffix)
    if path is None:
        files |= layer_texts_of(layer)
    contents = tuple(
        parse_model_file(t.encode(), n) for n, t in files.items() if n in own and n.endswith("yaml")
    )
    family = f"{on_what.name}/{found.name}"
    return BuiltModel(
        family, files | {KERNELS: text}, contents, tables[0].source, not counted, path is None
    )


def _fitted(llm: Llm, on: OnGpu, tables: Sequence[KernelTable], text: str) -> dict[str, str]:
    digest = hashlib.sha256(text.encode()).hexdigest()
    measured = tables[0].measured
    source = Source(tables[0].source, KERNELS, digest, "measured" if measured else "assumed")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, KERNELS)
        write_whole(path, text)
        profiles = [cut(t) for t in read_profile(path)]  # as anybody reads it who fits it again
    return fit_tables(profiles, llm, on, source, f"{on.gpu.name}/{llm.name}")


def _described(own: dict[str, str], llm: Llm, gpu: Gpu, shipped_gpu: bool) -> dict[str, str]:
    """Files that name descriptions beside them where those are not shipped, and these."""
    names, texts = {}, {}
    if not shipped_gpu:
        names["gpu"] = f"{gpu.name}.yaml"
        texts[names["gpu"]] = _yaml(gpu)
    if not _is_shipped(llm):
        names["llm"] = f"{llm.name}.yaml"
        texts[names["llm"]] = _yaml(llm)
    out = {}
    for name, text in own.items():
        if name.endswith(".yaml") and names:
            content = parse_model_file(text.encode(), name).model_copy(update=names)
            text = dump_fitted(content)
        out[name] = text
    if clash := set(out) & set(texts):
        raise BiscaleError(
            f"{min(clash)} is the name of a coefficient file: rename the description"
        )
    return out | texts


def _is_shipped(llm: Llm) -> bool:
    """Whether a shipped description says the same."""
    if llm.name not in list_names("llms"):
        return False
    told = {"sources", "dtype", "parameters"}
    return load_llm(llm.name).model_dump(exclude=told) == llm.model_dump(exclude=told)


def _yaml(description: Gpu | Llm) -> str:
    return yaml.safe_dump(description.model_dump(mode="json"), sort_keys=False, width=150)
