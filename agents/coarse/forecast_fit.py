"""Training of the forecast: maximum likelihood of Student's t with torch, then its residuals."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from agents.coarse.coarse_config import CoarseConfig
from agents.coarse.load_forecast import LONGEST, LoadForecast, load_changes
from biscale_env.envs.cluster.stream import DAY_S

Floats = NDArray[np.float64]
FREEDOM: Final = 3.0  # degrees of freedom: rare jumps should not widen every forecast (assumed)
CHECK_EVERY: Final = 20
FIRST_SPREAD: Final = -2.3  # logarithm; a tenth
EMPTY: Final = 0.02  # of the mean load: a service that is down says nothing about the next load


def examples(config: CoarseConfig, days: Sequence[int]) -> tuple[Floats, Floats]:
    """Features (n, 10) and changes of the load (n,) of every window of some days.

    The windows before a day are known where there is a day before and it is whole.
    """
    seen, changes = [], []
    whole = np.isclose(config.windows * config.window_s, DAY_S)
    for day in config.service_days(tuple(days), config.seed):
        rates = day.rates_rps(config.windows, config.window_s)
        first = 1
        if day.day > 0 and whole:
            earlier = replace(day, day=day.day - 1).rates_rps(config.windows, config.window_s)
            first = min(LONGEST + 1, len(earlier))
            rates = np.concatenate([earlier[-first:], rates])
        for k in range(first, len(rates)):
            if min(rates[k], rates[k - 1]) > EMPTY * config.mean_rps:
                seen.append(load_changes(rates[max(k - LONGEST - 1, 0) : k].tolist()))
                changes.append(np.log(rates[k] / rates[k - 1]))
    return np.array(seen), np.array(changes)


def _loss(out: torch.Tensor, change: torch.Tensor) -> Any:
    """Negative log-likelihood but for a constant, mean over the examples."""
    z = (change - out[:, 0]) * torch.exp(-out[:, 1])
    return (out[:, 1] + (FREEDOM + 1) / 2 * torch.log1p(z * z / FREEDOM)).mean()


def _fit_member(
    config: CoarseConfig, seed: int, learned: Sequence[torch.Tensor], held: Sequence[torch.Tensor]
) -> tuple[dict[str, NDArray[np.float64]], float]:
    """Weights of least validation loss on the way of one network, and that loss."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(learned[0].shape[1], config.hidden), nn.Tanh())
    out = nn.Linear(config.hidden, 2)
    nn.init.zeros_(out.weight)
    out.bias.data = torch.tensor([0.0, FIRST_SPREAD])
    net.append(out)
    adam = torch.optim.AdamW(
        net.parameters(), config.learning_rate, weight_decay=config.weight_decay
    )
    best, least = {}, np.inf
    for step in range(config.steps):
        adam.zero_grad()
        loss = _loss(net(learned[0]), learned[1])
        loss.backward()
        adam.step()
        if step % CHECK_EVERY == CHECK_EVERY - 1 or step == config.steps - 1:
            with torch.no_grad():
                value = float(_loss(net(held[0]), held[1]))
            if value < least:
                state = {name: x.numpy().astype(np.float64) for name, x in net.state_dict().items()}
                best, least = state, value
    return best, least


def fit_forecast(config: CoarseConfig, say: Callable[[str], None]) -> LoadForecast:
    """Train the networks; the residuals are those of training and validation days together.

    A calm service may jump as well, which so few days cannot teach: a share of the forecast is what
    any window has brought.

    Args:
        config: of the run.
        say: takes a line per network.
    """
    learned, held = examples(config, config.days), examples(config, config.validation_days)
    centre, scale = learned[0].mean(axis=0), learned[0].std(axis=0) + 1e-6

    def tensors(data: tuple[Floats, Floats]) -> list[torch.Tensor]:
        parts = ((data[0] - centre) / scale, data[1])
        return [torch.tensor(x, dtype=torch.float32) for x in parts]

    members = []
    for k in range(config.members):
        state, loss = _fit_member(config, 1000 * config.seed + k, tensors(learned), tensors(held))
        members.append(state)
        say(f"forecast {k + 1} of {config.members}: {len(learned[1])} windows, loss {loss:.4f}")
    parts = {
        name: np.array([m[key].T for m in members])
        for name, key in (
            ("weights", "0.weight"),
            ("biases", "0.bias"),
            ("out_weights", "2.weight"),
            ("out_biases", "2.bias"),
        )
    }
    plain = LoadForecast(
        centre=centre, scale=scale, residuals=np.zeros(1), jumps=np.zeros(0), **parts
    )
    both = [np.concatenate(pair) for pair in zip(learned, held, strict=True)]
    location, spread = plain.location_and_spread(both[0])
    jumps = round(config.jump_share * config.residuals)
    return replace(
        plain,
        residuals=np.quantile((both[1] - location) / spread, _levels(config.residuals - jumps)),
        jumps=np.quantile(both[1], _levels(jumps)),
    )


def _levels(count: int) -> Floats:
    """Middles of so many equal parts of [0, 1]."""
    return (np.arange(count) + 0.5) / max(count, 1)
