"""The leaderboard: score cards side by side, per suite, version and tier."""

from collections.abc import Sequence
from itertools import groupby

from biscale_env.core.markdown import markdown_table
from biscale_env.evaluation.report import words
from biscale_env.evaluation.suite.card_page import training_words
from biscale_env.evaluation.suite.score_card import Aggregate, ScoreCard
from biscale_env.evaluation.suite.tasks import CLUSTER_TIERS, TIERS

HEAD = (
    "policy",
    "score",
    "in distribution",
    "held out",
    "SLO missed",
    "improves on BiScale's own",
    "decision, median",
    "training",
)
EMPTY = "No score card yet."


def leaderboard_markdown(cards: Sequence[ScoreCard]) -> str:
    """One table per suite, version, digest and tier, the newest version first.

    A policy that misses an SLO stands below all that miss fewer, whatever its score.
    """
    if not cards:
        return EMPTY
    parts = []
    ordered = sorted(cards, key=lambda card: (card.suite, -card.suite_version, card.suite_digest))
    for (suite, version, digest), group in groupby(ordered, key=_suite):
        mine = list(group)
        parts.append(f"### {suite} v{version}\n\nDigest of the tasks: `{digest[:12]}`.")
        parts += [part for tier in (*TIERS, *CLUSTER_TIERS) if (part := _tier_table(mine, tier))]
    return "\n\n".join(parts)


def _suite(card: ScoreCard) -> tuple[str, int, str]:
    return card.suite, card.suite_version, card.suite_digest


def _tier_table(cards: Sequence[ScoreCard], tier: str) -> str:
    here = [(card, whole) for card in cards if (whole := card.of(tier)) is not None]
    if not here:
        return ""
    ranked = sorted(here, key=lambda each: (len(each[1].missed), -each[1].score.estimate))
    table = markdown_table(HEAD, [_row(card, whole, tier) for card, whole in ranked])
    missed = [
        f"- {card.policy} misses the SLO of {', '.join(whole.missed)}."
        for card, whole in ranked
        if whole.missed
    ]
    unscored = {each.task: each.reason for card, _ in ranked for each in card.unscored}
    notes = missed + [
        f"- Without a score: {task}: {reason}."
        for task, reason in unscored.items()
        if task.startswith(f"{tier}/")
    ]
    return f"**{tier}**\n\n{table}" + ("\n\n" + "\n".join(notes) if notes else "")


def _row(card: ScoreCard, whole: Aggregate, tier: str) -> tuple[str, ...]:
    splits = [card.of(tier, split) for split in HEAD[2:4]]
    times = [
        result.decision_median_s
        for result in card.results
        if result.task.startswith(f"{tier}/") and result.decision_median_s is not None
    ]
    tuned = any(r.tuned for r in card.results if r.task.startswith(f"{tier}/"))
    own_cost = tuple(cost for cost in card.training if cost.tier == tier)
    return (
        card.policy if tuned else f"{card.policy} (nothing to tune)",
        str(whole.score),
        *(str(each.score) if each else words.MISSING for each in splits),
        f"{len(whole.missed)} of {whole.n_tasks}",
        str(whole.better),
        words.duration(max(times)) if times else words.MISSING,
        training_words(card.model_copy(update={"training": own_cost})),
    )
