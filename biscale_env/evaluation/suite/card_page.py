"""Score cards as one self-contained HTML page, and as a few lines of text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from biscale_env.core.files import write_whole
from biscale_env.evaluation.report import words
from biscale_env.evaluation.report.page import template
from biscale_env.evaluation.suite.score_card import ALL, Aggregate, ScoreCard, TaskResult


def write_cards_page(cards: Sequence[ScoreCard], path: Path) -> None:
    """Write the page of some cards of one suite."""
    write_whole(path, cards_html(cards))


def cards_html(cards: Sequence[ScoreCard]) -> str:
    """The page as HTML text; it loads nothing."""
    first = cards[0]
    return template("score_card.html.j2").render(
        title=f"BiScale-Bench {first.suite} v{first.suite_version}",
        cards=[card_view(card) for card in cards],
        digest=first.suite_digest,
        provenance=first.provenance,
    )


def card_view(card: ScoreCard) -> dict[str, Any]:
    """What the template shows of a card."""
    return {
        "policy": card.policy,
        "build": card.build,
        "scores": [score_view(each) for each in card.scores],
        "missed": [result for result in card.results if not result.met],
        "unscored": card.unscored,
        "training": training_words(card),
        "rows": [result_view(result) for result in card.results],
    }


def score_view(each: Aggregate) -> dict[str, Any]:
    """One line of the summary."""
    tier = "all tiers" if each.tier == ALL else each.tier
    return {
        "name": tier if each.split == ALL else f"{tier}, {each.split}",
        "whole": each.split == ALL,
        "score": str(each.score),
        "mean": f"{each.mean:.3f}",
        "better": str(each.better),
        "missed": f"{len(each.missed)} of {each.n_tasks}",
        "any_missed": bool(each.missed),
    }


def result_view(result: TaskResult) -> dict[str, Any]:
    """One row of the table of tasks."""
    tier, _, name = result.task.partition("/")
    times = [
        words.MISSING if time is None else words.duration(time)
        for time in (result.decision_median_s, result.decision_p99_s)
    ]
    return {
        "tier": tier,
        "name": name,
        "split": result.split,
        "met": result.met,
        "score": f"{result.score:.3f}",
        "bar": max(0.0, min(100.0, 100.0 * result.score)),
        "ratio": words.ratio_text(result.energy_ratio),
        "own": words.ratio_text(result.own_ratio),
        "bound": words.ratio_text(result.bound_ratio)
        + ("" if result.bound_of == "bound" else " *"),
        "attainment": f"{words.share(result.attainment)} of {words.share(result.target)}",
        "better": f"{result.better:.2f}",
        "setting": "; ".join(s or words.MISSING for s in result.settings)
        if result.tuned
        else "nothing to tune",
        "decision": " / ".join(times),
    }


def training_words(card: ScoreCard) -> str:
    """Training cost in words; a dash where no checkpoint says."""
    return (
        "; ".join(
            f"{cost.tier}: {cost.env_steps / 1e6:.2g} million steps{_minutes(cost.cpu_minutes)}"
            f" ({cost.algorithm})" + (f", {len(cost.seeds)} seeds" if len(cost.seeds) > 1 else "")
            for cost in card.training
        )
        or words.MISSING
    )


def _minutes(minutes: float | None) -> str:
    if minutes is None:
        return ""
    return f", {minutes:.0f} CPU minutes" if minutes >= 10.0 else f", {minutes:.2g} CPU minutes"


def card_text(card: ScoreCard) -> str:
    """The scores of a card for the terminal; missed tasks are named."""
    lines = [f"{card.policy} on {card.suite} v{card.suite_version}"]
    for each in card.scores:
        view = score_view(each)
        indent = "  " if each.split == ALL else "    "
        lines.append(
            f"{indent}{view['name']}: score {view['score']}, better than BiScale's own "
            f"{view['better']}, SLO missed in {view['missed']}"
        )
    lines += [f"  missed: {r.task}: {words.share(r.attainment)} % of {words.share(r.target)} %"
              for r in card.results if not r.met]  # fmt: skip
    lines += [f"  without a score: {each.task}: {each.reason}" for each in card.unscored]
    return "\n".join(lines)
