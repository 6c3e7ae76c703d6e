"""One self-contained ``report.html``.

Opens offline, loads nothing, fits any screen, light or dark.
"""

import json
import math
from pathlib import Path
from typing import Any, Final

import jinja2
import pandas as pd
import plotly.io
import yaml
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import write_whole
from biscale_env.evaluation.report import tables, verdicts, words
from biscale_env.evaluation.report.class_rows import CLASSES_NOTE, class_rows
from biscale_env.evaluation.report.decomposition_table import NOTE, decomposition_rows
from biscale_env.evaluation.report.drawing.figure_style import at_point
from biscale_env.evaluation.report.drawing.figures import NAMES, figure
from biscale_env.evaluation.report.drawing.palette import dark_twins, styles
from biscale_env.evaluation.report.overview import overviews, point_title
from biscale_env.evaluation.runs import run_files
from biscale_env.evaluation.runs.class_columns import class_table
from biscale_env.evaluation.runs.record import is_bound
from biscale_env.evaluation.runs.run_view import Run
from biscale_env.evaluation.stats.decomposition import decompose

FIGURE_BUDGET_BYTES: Final = 2_800_000
"""With Plotly itself (4.8 MB) the page stays below 8 MB.

Points beyond it get their table only, and the page says so.
"""

_CAPTIONS: Final = {
    "energy": (
        "Energy against attainment",
        "Lower is less energy, further right is more requests within the SLO. Bars: 95 % intervals "
        "over windows of time: another stretch like this one, the plant as it is.",
    ),
    "tuning": (
        "What tuning could choose from",
        "Each controller's best settings on the tuning workloads, by rising attainment; the large "
        "marker was chosen.",
    ),
    "ttft": (
        "Time to first token",
        "Every request of every workload; the vertical scale magnifies the tail.",
    ),
    "tpot": (
        "Time per output token",
        "Every request of every workload; the vertical scale magnifies the tail.",
    ),
    "clocks": (
        "Clocks in the busiest minute",
        "Effective clock of each controller while the same requests arrive.",
    ),
    "timeline": (
        "The busiest minute, second by second",
        "Click a name to show or hide a controller.",
    ),
}


def write_report(run: Run, path: Path | None = None, title: str | None = None) -> Path:
    """Write the report of a run and return its path.

    Args:
        run: the opened run directory.
        path: where to; ``report.html`` in the run directory by default.
        title: heading; made from the scenarios by default.
    """
    target = path or run.path / run_files.REPORT
    write_whole(target, render(run, title))
    return target


def template(name: str) -> jinja2.Template:
    """A template of the pages of this package; a name it lacks a value for is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("biscale_env.evaluation", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def render(run: Run, title: str | None = None) -> str:
    """The report as HTML text."""
    look = styles(run.results["policy"].tolist())
    names = run.results["workload" if "workload" in run.results else "scenario"]
    scenarios = list(dict.fromkeys(names.fillna(run.results["scenario"])))
    points = point_views(run)
    return template("report.html.j2").render(
        title=title
        or f"Clock control on {', '.join(scenarios[:3])}{' …' if len(scenarios) > 3 else ''}",
        points=points,
        overviews=overviews(run) if len(points) > 1 else [],
        infeasible=[point["title"] for point in points if point["infeasible"]]
        + [f"{point_title(point)}: no table, since {point['reason']}" for point in run.infeasible],
        look={name: {"color": style.color, "dark": style.dark} for name, style in look.items()},
        twins=Markup(_script_json(dark_twins(list(look.values())))),
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
        savings_note=NOTE,
        classes_note=CLASSES_NOTE,
        provenance=run.provenance,
        config=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
    )


def _script_json(value: Any) -> str:
    """JSON that may stand inside a script element."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("</", "<\\/").replace("<!--", "<\\!--")


def point_views(run: Run) -> list[dict[str, Any]]:
    """What the template shows of each operating point.

    Facts, verdict, table and figures within the size budget.
    """
    views, spent = [], 0
    summary, savings = run.summary(), decompose(run.results)
    classes = class_table(run.results)
    for number, point in enumerate(run.points()):
        rows = tables.ordered(at_point(summary, point))
        first = {str(k): v for k, v in rows.iloc[0].to_dict().items()}
        drawn = figures_of(run, point) if spent < FIGURE_BUDGET_BYTES else None
        if drawn is not None and spent + sum(len(f["json"]) for f in drawn) > FIGURE_BUDGET_BYTES:
            drawn = None
        spent += sum(len(f["json"]) for f in drawn or [])
        views.append(
            {
                "id": f"point-{number}",
                "title": point_title(point),
                "facts": facts(run, point, first),
                "verdict": verdicts.verdict(rows),
                "infeasible": verdicts.infeasible(rows),
                "metrics": words.metrics_of(point["phase"]),
                "curves": verdicts.compared_at_equal_attainment(rows),
                "rows": [
                    table_row({str(k): v for k, v in row.items()})
                    for row in rows.to_dict("records")
                ],
                "savings": [] if savings.empty else decomposition_rows(at_point(savings, point)),
                "classes": [] if classes.empty else class_rows(at_point(classes, point)),
                "figures": drawn or [],
                "left_out": drawn is None,
            }
        )
    return views


def facts(run: Run, point: dict[str, Any], first: dict[str, Any]) -> list[str]:
    """Facts of a scenario that a reader needs before the numbers."""
    rows = at_point(run.results, point)
    workloads, members = rows["workload_seed"].nunique(), rows["ensemble_member"].nunique()
    found = [words.requirement(first), f"{rows['rate_rps'].mean():.3g} requests/s"]
    if caption := tables.load_caption(rows):
        found.append(caption.removesuffix("."))
    elif not pd.isna(point["load"]):
        found.append(f"{100 * point['load']:.0f} % of the capacity at max clock")
    found.append(
        f"{int(rows.groupby('policy')['n_requests'].sum().max()):,} requests per controller"
    )
    found.append(
        f"{workloads} workload{'s' * (workloads > 1)} × "
        f"{members} ensemble member{'s' * (members > 1)}"
    )
    found.append(f"TP{point['tp']} {point['dtype']}, {first['n_gpus']} GPUs")
    return found + cache_facts(rows)


def cache_facts(rows: pd.DataFrame) -> list[str]:
    """What the prefix cache spared, where prompts share anything that is known."""
    if "prefix_cache" not in rows or (rows["prefix_cache"].fillna("off") == "off").all():
        return []
    rule, share = str(rows["prefix_cache"].iloc[0]), float(rows["cached_share"].mean())
    spared = "" if math.isnan(share) else f", {words.share(share)} % of prompt tokens cached"
    return [f"prefix cache {rule}{spared}"]


def table_row(row: dict[str, Any]) -> dict[str, Any]:
    """One row of the table with intervals and the length of its energy bar."""
    ratio = float(row["energy_ratio"])
    times = (row["decision_time_median_s"], row["decision_time_p99_s"])
    decision = " / ".join(words.duration(time) for time in times)
    latencies = [
        {
            "text": words.number(1e3 * float(row[f"{metric}_p{q}_s"])),
            "interval": words.interval(row, f"{metric}_p{q}_s", 1e3, 0),
            "late": float(row[f"{metric}_p{q}_s"]) > row[f"slo_{metric}_s"],
        }
        for metric in words.metrics_of(row["phase"])
        for q in (50, 90, 99)
    ]
    return {
        "label": tables.shown_name(row, mark=""),
        "policy": row["policy"],
        "bound": is_bound(row["policy"]),
        "energy": words.number(float(row["energy_per_output_token_j"])),
        "ratio": words.ratio_text(ratio),
        "ratio_interval": words.interval(row, "energy_ratio", 1.0, 3),
        "bar": max(0.0, min(100.0, 100 * ratio)) if math.isfinite(ratio) else 0.0,
        "attainment": words.share(float(row["attainment"])),
        "attainment_interval": words.interval(row, "attainment", 100.0, 2),
        "equal": tables.equal_cells(row) if "equal_ratio" in row else {},
        "members": tables.ends(row, "member_ratio") if "member_ratio_low" in row else "",
        "latencies": latencies,
        "decision": "–" if decision == "– / –" else decision,
        "failures": int(row["solver_failures"]),
        "slo": words.slo_words(row),
        "met": bool(row["target_met"]),
    }


def figures_of(run: Run, point: dict[str, Any]) -> list[dict[str, str]]:
    """The figures of one operating point as JSON with their captions.

    Those the kept data do not allow are left out.
    """
    found = []
    for name in NAMES:
        try:
            drawn = figure(run, name, point)
        except BiscaleError:
            continue
        title, caption = _CAPTIONS[name]
        text = _script_json(plotly.io.to_json(drawn, validate=False, engine="json"))
        height = str(int(drawn.layout.height or 430))
        found.append(
            {
                "name": name,
                "title": title,
                "caption": caption,
                "height": height,
                "json": Markup(text),
            }
        )
    return found
