"""``biscale benchmark``: score cards of policies on a frozen suite, and their verification."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from biscale_env.cli.comparison_options import Jobs, OutFolder, RayAddress, Resume
from biscale_env.core.errors import BiscaleError

if TYPE_CHECKING:
    from biscale_env.jobs.workers import Workers

VERIFY = "verify"

PolicyNames = Annotated[
    list[str],
    typer.Argument(
        metavar="POLICY...|verify CARD",
        help="Each a name or label=name: names, agent, checkpoints, a folder of training seeds, "
        "module:Class. Or 'verify' and score cards: check their arithmetic and run a sample again.",
    ),
]
TierName = Annotated[
    str | None,
    typer.Option(
        "--tier",
        help="prefill or decode, by default both; cluster: placements of windows; multi: the clock "
        "of every instance of a cluster.",
    ),
]
SuiteName = Annotated[
    str, typer.Option("--suite", help="core, full (configs/benchmark), or a YAML file.")
]
SampleSize = Annotated[
    int, typer.Option("--tasks", min=0, help="verify: tasks that are run again.")
]
SampleSeed = Annotated[int, typer.Option("--sample", min=0, help="verify: seed of the sample.")]
PolicyHere = Annotated[
    str | None,
    typer.Option("--policy", help="verify: the policy's name here, if not the card's."),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("benchmark")(benchmark)


def benchmark(
    policies: PolicyNames,
    *,
    tier: TierName = None,
    suite: SuiteName = "core",
    out: OutFolder = None,
    resume: Resume = False,
    jobs: Jobs = None,
    ray: RayAddress = None,
    tasks: SampleSize = 2,
    sample: SampleSeed = 0,
    policy: PolicyHere = None,
) -> None:
    """Score policies on a frozen suite: 0 is max clock, 1 the bound, a missed SLO is 0.

    Every policy is tuned by the same rule. Writes a score card per policy and one page.
    """
    from biscale_env.evaluation.suite.tasks import CLUSTER_TIERS, load_suite
    from biscale_env.jobs.workers import Workers

    workers = Workers.of(jobs, ray)
    if policies[0] == VERIFY:
        if tier is not None or resume:
            raise BiscaleError("biscale benchmark verify takes neither --tier nor --resume")
        _verify(policies[1:], suite, tasks, sample, policy, out, workers)
        return
    from biscale_env.evaluation.suite import benchmark as suites
    from biscale_env.evaluation.suite.card_page import card_text
    from biscale_env.evaluation.suite.score_card import read_card

    if policy is not None:
        raise BiscaleError("--policy is for biscale benchmark verify: give policies as arguments")
    if tier is not None and tier in CLUSTER_TIERS:
        from biscale_env.reproduce.cluster_suite import cluster_benchmark, cluster_tasks

        frozen = cluster_tasks.load_cluster_suite(suite)
        request = cluster_benchmark.ClusterRequest(frozen, policies, cluster_tasks.tier_of(tier))
        paths = cluster_benchmark.run_cluster_benchmark(request, out, resume, workers)
    else:
        paths = suites.run_benchmark(
            suites.BenchmarkRequest(load_suite(suite), policies, tier), out, resume, workers
        )
    for path in paths:
        print(card_text(read_card(path)) + f"\n  score card: {path}\n")
    print(f"page: {paths[0].with_name(suites.CARDS_PAGE)}")


def _verify(
    cards: list[str],
    suite: str,
    tasks: int,
    sample: int,
    policy: str | None,
    out: Path | None,
    workers: "Workers",
) -> None:
    from biscale_env.evaluation.suite.score_card import read_card
    from biscale_env.evaluation.suite.tasks import CLUSTER_TIERS, load_suite
    from biscale_env.evaluation.suite.verification import require_valid, rerun, verify

    if not cards:
        raise BiscaleError("biscale benchmark verify needs a score card, a JSON file")
    if len(cards) > 1 and (out is not None or policy is not None):
        raise BiscaleError("--out and --policy are for one score card: verify them one by one")
    for name in cards:
        path = Path(name)
        told = read_card(path)
        given = suite if suite.endswith((".yaml", ".yml")) else None
        if set(told.tiers) & set(CLUSTER_TIERS):
            from biscale_env.reproduce.cluster_suite import cluster_benchmark, cluster_tasks

            of_clusters = cluster_tasks.load_cluster_suite(given or suite)
            again = cluster_benchmark.rerun_clusters
            faults = verify(path, of_clusters, tasks, sample, policy, out, workers, again)
        else:
            frozen = load_suite(given or told.suite)
            faults = verify(path, frozen, tasks, sample, policy, out, workers, rerun)
        require_valid(path, faults)
        print(f"{name} holds: {told.policy} on {told.suite} v{told.suite_version}, "
              f"arithmetic and {min(tasks, len(told.results))} tasks run again")  # fmt: skip
