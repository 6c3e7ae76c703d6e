"""What plain Stable-Baselines3 learns: PPO as it comes, on the public ids, seen on other workloads.

Usage: python docs/plain_sb3.py OUT.csv   (then `python docs/update.py plain-sb3=OUT.csv`)
"""

import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd

import biscale_env  # noqa: F401 - registers the ids
from biscale_env.core.exact_csv import read_exact
from biscale_env.core.files import write_whole
from biscale_env.core.markdown import markdown_table
from biscale_env.core.svg import save_svg, svg_axes
from biscale_env.evaluation import evaluate
from biscale_env.evaluation.report.drawing.palette import GRID, INK, styles

LINES = {"solid": "--", "dash": ":"}
STATIC = "static-hindsight"
SHOWN = (STATIC, "mpc", "mpc-plus")
ENVS = {"BiScale/Prefill-v1": ("mpc", "mpc-plus")}  # id: controllers shown beside it
TARGET = 0.99
CLOCKS_MHZ = range(510, 1981, 30)
STEPS = 300_000
EVERY = 25_000
SEEDS = (0, 1, 2)
EPISODES = 8
HELD_OUT_SEED = 10_000
COLUMNS = ("env", "policy", "seed", "step", "episode", "energy_ratio", "attainment", "requests")


def seen(policy: object, env_id: str, name: str, seed: int, step: int) -> list[tuple[object, ...]]:
    """The rows of one evaluation on the held-out episodes."""
    env = gym.make(env_id)
    frame = evaluate(policy, env, episodes=EPISODES, seed=HELD_OUT_SEED)
    env.close()
    columns = zip(
        frame["energy_ratio"], frame["attainment"], frame["requests_finished"], strict=True
    )
    return [(env_id, name, seed, step, k, *values) for k, values in enumerate(columns)]


def learn(env_id: str, seed: int, steps: int = STEPS, every: int = EVERY) -> pd.DataFrame:
    """One training run with the library's defaults; a row per held-out episode."""
    from stable_baselines3 import PPO

    model = PPO("MlpPolicy", env_id, seed=seed)
    rows = seen(model, env_id, "ppo", seed, 0)
    while model.num_timesteps < steps:
        model.learn(every, reset_num_timesteps=False)
        rows += seen(model, env_id, "ppo", seed, model.num_timesteps)
        last = pd.DataFrame(rows[-EPISODES:], columns=list(COLUMNS))
        print(f"{env_id}, seed {seed}, step {model.num_timesteps:,}: {_told(last)}", flush=True)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def references() -> pd.DataFrame:
    """The same episodes under controllers as they come, and the best static clock for them."""
    rows: list[tuple[object, ...]] = []
    for env_id, names in ENVS.items():
        for name in ("max", *names):
            rows += seen(name, env_id, name, 0, 0)
        rows += best_static(env_id)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def best_static(env_id: str) -> list[tuple[object, ...]]:
    """The lowest static clock from which on the SLO is held, on the episodes that are judged."""
    held: list[tuple[object, ...]] = []
    for freq_mhz in reversed(CLOCKS_MHZ):
        rows = seen(f"static:freq_mhz={freq_mhz}", env_id, STATIC, 0, 0)
        energy, met = _mean(pd.DataFrame(rows, columns=list(COLUMNS)))
        if met < TARGET:
            return held
        if not held or energy < _mean(pd.DataFrame(held, columns=list(COLUMNS)))[0]:
            held = rows
    return held


def _mean(rows: pd.DataFrame) -> tuple[float, float]:
    """Mean energy ratio over episodes, and the share of their requests within the SLO."""
    met = np.average(rows["attainment"], weights=rows["requests"])
    return float(rows["energy_ratio"].mean()), float(met)


def _told(rows: pd.DataFrame) -> str:
    energy, met = _mean(rows)
    return f"energy {energy:.3f} of max clock, {100 * met:.2f} % within the SLO"


def curves(rows: pd.DataFrame) -> pd.DataFrame:
    """Energy ratio and attainment of every evaluation: env, policy, seed, step."""
    keys = ["env", "policy", "seed", "step"]
    found = [(*key, *_mean(group)) for key, group in rows.groupby(keys)]
    return pd.DataFrame(found, columns=[*keys, "energy_ratio", "attainment"])


def draw(rows: pd.DataFrame, path: Path) -> None:
    """Energy ratio above, attainment below, a column per environment, a line per training seed."""
    found = curves(rows)
    look = styles(SHOWN)
    ids = [env_id for env_id in ENVS if env_id in set(found["env"])]
    figure, axes = svg_axes(2, len(ids), (4.6 * len(ids), 5.2), squeeze=False, sharex=True)
    for column, env_id in enumerate(ids):
        here = found[found["env"] == env_id]
        for axis, what, scale in zip(
            axes[:, column], ("energy_ratio", "attainment"), (1.0, 100.0), strict=True
        ):
            for seed, line in here[here["policy"] == "ppo"].groupby("seed"):
                axis.plot(
                    line["step"] / 1e3,
                    scale * line[what],
                    color=INK,
                    linewidth=1.2,
                    label="PPO, three training seeds" if seed == SEEDS[0] else None,
                )
            for _, line in here[here["policy"].isin(SHOWN)].iterrows():
                name = str(line["policy"])
                axis.axhline(
                    scale * line[what],
                    color=look[name].color,
                    ls=LINES[look[name].dash],
                    label=name,
                )
            axis.grid(color=GRID)
        axes[0, column].set_title(env_id, fontsize=10)
        axes[1, column].set_xlabel("thousand env steps")
        axes[0, column].legend(frameon=False, fontsize=8)
    axes[0, 0].set_ylabel("energy, ratio to max clock")
    axes[1, 0].set_ylabel("requests within the SLO, %")
    figure.tight_layout()
    save_svg(figure, path)


def markdown(rows: pd.DataFrame) -> str:
    """The end of each training seed beside the controllers, on the same episodes."""
    found = curves(rows)
    last = found.sort_values("step").groupby(["env", "policy", "seed"], as_index=False).last()
    table = [
        (
            str(line["env"]),
            f"PPO, seed {line['seed']}" if line["policy"] == "ppo" else str(line["policy"]),
            f"{line['step']:,}" if line["step"] else "",
            f"{line['energy_ratio']:.3f}",
            f"{100 * line['attainment']:.2f}",
        )
        for _, line in last.iterrows()
    ]
    table.sort(key=lambda row: (list(ENVS).index(row[0]), -float(row[3])))
    return markdown_table(("environment", "policy", "steps", "energy", "SLO met, %"), table, "llr")


def main(out: str) -> None:
    """Train, evaluate, write the rows; seeds that the file holds already are kept."""
    known = read_exact(Path(out)) if Path(out).is_file() else pd.DataFrame(columns=list(COLUMNS))
    learned = known[known["policy"] == "ppo"]
    frames = [references()]
    for env_id in ENVS:
        for seed in SEEDS:
            kept = learned[(learned["env"] == env_id) & (learned["seed"] == seed)]
            whole = not kept.empty and kept["step"].max() >= STEPS
            frames.append(kept if whole else learn(env_id, seed))
            write_whole(Path(out), pd.concat(frames).to_csv(index=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
