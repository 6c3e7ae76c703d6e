"""Tables in GitHub Markdown."""

from collections.abc import Iterable, Sequence


def markdown_table(
    heads: Sequence[str], rows: Iterable[Sequence[object]], align: str = "lr"
) -> str:
    """A table; a bar within a cell does not end it.

    Args:
        heads: of the columns.
        rows: a cell for each of them.
        align: ``l`` or ``r`` per column; the last one counts for all that follow.
    """
    sides = align.ljust(len(heads), align[-1])[: len(heads)]
    ruler = ["---:" if side == "r" else "---" for side in sides]
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(ruler)}|"]
    for row in rows:
        cells = [str(cell).replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
