"""`biscale export`: runs in the formats of other tools."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from biscale_env.cli.export_minari_command import minari
from biscale_env.core.errors import BiscaleError

if TYPE_CHECKING:
    from biscale_env.evaluation.runs.run_view import Run


def register(app: typer.Typer) -> None:
    """Add `biscale export perfetto` and `biscale export minari`."""
    group = typer.Typer(help="Runs in the formats of other tools.", no_args_is_help=True)
    group.command("perfetto")(perfetto)
    group.command("minari")(minari)
    app.add_typer(group, name="export")


def perfetto(
    run: Annotated[Path, typer.Argument(help="Run directory of a comparison.")],
    *,
    out: Annotated[
        Path | None, typer.Option(help="File to write; default: RUN/perfetto.json.")
    ] = None,
    point: Annotated[int, typer.Option(min=0, help="Number of the operating point.")] = 0,
    policy: Annotated[
        list[str] | None, typer.Option(help="Policy by its label; repeat it; default: all.")
    ] = None,
    start: Annotated[float, typer.Option(min=0.0, help="First second to write.")] = 0.0,
    end: Annotated[float | None, typer.Option(help="Last second; default: all.")] = None,
) -> None:
    """Write a timeline that Perfetto opens: a process per policy, all on the same workload."""
    from biscale_env.evaluation.runs.perfetto import write_perfetto
    from biscale_env.evaluation.runs.run_view import load_run

    opened = load_run(run)
    path = run / "perfetto.json" if out is None else out
    until = math.inf if end is None else end
    count = write_perfetto(opened, path, _chosen(opened, point, policy), (start, until))
    typer.echo(f"{path}: {count} events; open it at ui.perfetto.dev or in chrome://tracing")


def _chosen(run: "Run", point: int, wanted: list[str] | None) -> list[str]:
    from biscale_env.evaluation.report.drawing.figure_style import at_point
    from biscale_env.evaluation.report.drawing.figures_time import common_runs

    points = run.points()
    if point >= len(points):
        raise BiscaleError(
            f"{run.path} has {len(points)} operating points; --point {point} is none"
        )
    rows = at_point(run.results, points[point])
    found = common_runs(run, rows, at_point(run.summary(), points[point]))
    unknown = [name for name in wanted or () if name not in found]
    if unknown:
        raise BiscaleError(
            f"no timeline of '{unknown[0]}' in {run.path}; there are: {', '.join(found)}"
        )
    return [found[name]["run_id"] for name in wanted or found]
