"""The kernel tables that are shipped: from the list of configurations to CSV files."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import pandas as pd
from pydantic import RootModel

from biscale_env.config import configs_dir, load_gpu, load_llm
from biscale_env.config.hardware import Dtype
from biscale_env.config.loader import parse_yaml, read_bytes
from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import write_whole
from biscale_env.models.build.kernel_tables import KernelTable, kernel_table
from biscale_env.models.build.partition import Partition, check_partition

LIST: Final = "configurations.yaml"


class Configurations(RootModel[dict[str, dict[str, dict[Dtype, list[int | str]]]]]):
    """GPU -> LLM -> number format -> TP degrees, such as ``4`` or ``2-ep2``."""

    def partitions(self, gpu: str, llm: str) -> list[Partition]:
        """How an LLM is spread over a GPU type, in the order of the list."""
        return [
            parse_partition(dtype, str(text))
            for dtype, degrees in self.root[gpu][llm].items()
            for text in degrees
        ]

    def pairs(self) -> list[tuple[str, str]]:
        """Every (GPU, LLM)."""
        return [(gpu, llm) for gpu, llms in self.root.items() for llm in llms]


def parse_partition(dtype: Dtype, text: str) -> Partition:
    """A partition from ``4`` or ``2-ep2``.

    Raises:
        BiscaleError: another form.
    """
    tp, dash, ep = text.partition("-ep")
    if not tp.isdigit() or (dash and not ep.isdigit()):
        raise BiscaleError(f"'{text}' must be a TP degree such as 4, or 2-ep2")
    return Partition(dtype, int(tp), int(ep or 1))


def shipped_configurations() -> Configurations:
    """The list that is shipped."""
    path = configs_dir() / "models" / LIST
    return Configurations.model_validate(parse_yaml(read_bytes(path), str(path)))


def table_text(gpu: str, llm: str, tables: Iterable[KernelTable]) -> str:
    """Content of the CSV file of one LLM on one GPU, all its configurations."""
    some = list(tables)
    sources = sorted({t.source for t in some})
    head = [
        f"# Kernel times of one iteration of {llm} on {gpu} at the default clock, s: "
        f"{'; '.join(sources)}.",
        "# Bursts without power cap, framework or host time. estimated_share: part of the time "
        "that does not rest on measured kernels alone.",
    ]
    body = pd.concat([t.rows for t in some], ignore_index=True)
    return "\n".join(head) + "\n" + body.to_csv(index=False, lineterminator="\n")


def write_shipped(
    folder: Path, only: str | None = None, progress: Callable[[str], None] = lambda _: None
) -> list[Path]:
    """Write the kernel tables of every listed configuration.

    Args:
        folder: of the CSV files.
        only: write no others than those of this GPU.
        progress: told what happens.

    Raises:
        BiscaleError: the extra is missing, or a configuration that the tables do not have.
    """
    listed = shipped_configurations()
    written = []
    for gpu_name, llm_name in listed.pairs():
        if only not in (None, gpu_name):
            continue
        gpu, llm = load_gpu(gpu_name), load_llm(llm_name)
        tables = []
        for part in listed.partitions(gpu_name, llm_name):
            check_partition(llm, gpu, part)
            tables.append(kernel_table(llm, gpu, part, progress))
        path = folder / f"{gpu_name}-{llm_name}.csv"
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, table_text(gpu_name, llm_name, tables))
        written.append(path)
    return written
