"""Policy iteration on clock costs, as an algorithm of Stable-Baselines3.

A round runs the policy, with some exploration, and asks in every few states what each clock costs
when the policy goes on from there (:class:`agents.training.worlds.clock_costs.ClockCosts`). The
actor is then fitted to choose clocks of least expected cost: with ``c_k`` the cost of clock ``a_k``
above the mean over the clocks and ``m`` the action that the network asks for, the mean over the
samples of the last rounds of::

    sum_k w_k clip(c_k / s),   w = softmax(-(a_k - m)^2 / (2 sigma^2)),   s: spread of its cell

is minimised over the network's weights. Costs are averaged, not the best clocks of single samples,
so the network learns the clock that is best on average over what may come, reserve included. The
luck that all clocks of a state share is taken out; there is no critic.

It is approximate policy iteration by rollouts (Lagoudakis and Parr, ICML 2003) with all actions
tried in every state and costs in place of classes; what it needs beyond PPO is a simulator that
starts from any state.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.utils import update_learning_rate

from agents.training.worlds.clock_costs import ClockCosts, check_tries, two_above_0
from agents.training.worlds.training_env import AgentVecEnv
from biscale_env.core.errors import BiscaleError

Floats32 = NDArray[np.float32]
# spreads of its cell that a cost counts for at most: late requests are rare and dear
MOST_SPREADS: Final = 20.0
# weight of the squared distance by which an action, or the network's output, leaves [-1, 1]
OVERSHOOT: Final = 0.05


class CostSamples(NamedTuple):
    """States of one round, with what each clock costs there.

    Attributes:
        features: what the network sees, (n, F).
        rule: the rule's action, (n,).
        cost: above the mean over the clocks, (n, clocks).
        cell: group and bin of penalties, (n,).
    """

    features: Floats32
    rule: Floats32
    cost: Floats32
    cell: NDArray[np.int64]

    def __deepcopy__(self, memo: dict[int, Any]) -> "CostSamples":
        """Itself: samples are never changed once they are made."""
        return self


def scaled_costs(cost: Floats32, cell: NDArray[np.int64]) -> Floats32:
    """Costs in units of their cell's root mean square, clipped, (n, clocks)."""
    squares = np.bincount(cell, (cost.astype(np.float64) ** 2).mean(axis=1))
    spread = np.sqrt(squares / np.maximum(np.bincount(cell), 1)) + 1e-6
    scaled = cost / spread[cell][:, None]
    return np.clip(scaled, -MOST_SPREADS, MOST_SPREADS).astype(np.float32)


def expected_cost(
    action: torch.Tensor, clocks: torch.Tensor, cost: torch.Tensor, sigma: float
) -> torch.Tensor:
    """Cost of actions that are spread over the clocks near them; differentiable in the action.

    Args:
        action: (n,); outside [-1, 1] the nearest end counts, and the distance is penalised.
        clocks: actions whose costs are known, (clocks,).
        cost: (n, clocks).
        sigma: width of the spread, in actions.

    Returns:
        (n,).
    """
    inside = action.clamp(-1.0, 1.0)
    near = torch.softmax(-((clocks[None] - inside[:, None]) ** 2) / (2.0 * sigma**2), dim=1)
    return (near * cost).sum(dim=1) + OVERSHOOT * (action - inside) ** 2


def _check_settings(counts: Mapping[str, Any], explore_share: float, device: Any) -> None:
    """Refuse counts below 1, a share that is none, and a device where the simulator is not.

    Raises:
        BiscaleError: names the setting.
    """
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise BiscaleError(
                f"policy_iteration: {name} must be a whole number above 0, got {value}"
            )
    if not 0.0 <= explore_share <= 1.0:
        raise BiscaleError(
            f"policy_iteration: explore_share must be from 0 to 1, got {explore_share}"
        )
    if str(device) not in ("auto", "cpu"):
        raise BiscaleError(f"policy_iteration: device must be cpu, got {device}")


class PolicyIteration(OnPolicyAlgorithm):
    """See the module. The critic of SB3's policy class is there and stays untrained.

    Attributes:
        rounds: samples of the last rounds, the newest last.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": ActorCriticPolicy}
    rounds: tuple[CostSamples, ...]

    def __init__(
        self,
        policy: Any,
        env: Any,
        *,
        learning_rate: Any = 1e-3,
        n_steps: int = 1500,
        sample_every: int = 5,
        clocks: int = 13,
        sigma: tuple[float, float] = (0.15, 0.08),
        horizon_s: Sequence[float] = (2.0, 10.0),
        explore_share: float = 0.5,
        rounds_kept: int = 6,
        n_epochs: int = 8,
        batch_size: int = 2048,
        max_grad_norm: float = 0.5,
        policy_kwargs: dict[str, Any] | None = None,
        tensorboard_log: str | None = None,
        seed: int | None = None,
        device: Any = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        """Keep the settings; those not named are SB3's.

        Args:
            policy: ``MlpPolicy``.
            env: a training environment of prefill, or None to decide only.
            learning_rate: of Adam, or a schedule.
            n_steps: env steps of every row in a round.
            sample_every: steps between two states of a row whose costs are asked for.
            clocks: tried in each of them.
            sigma: width of :func:`expected_cost` in the first round and at the end of training,
                linear between them; near the distance of two clocks, 2 / (clocks - 1), or below.
                A wider start finds the deeper of several minima over the clocks.
            horizon_s: shortest and longest horizon of :class:`ClockCosts`.
            explore_share: share of decisions that are made with the policy's exploration noise.
            rounds_kept: how many rounds the actor is fitted to.
            n_epochs: passes over their samples after each round.
            batch_size: samples per gradient step.
            max_grad_norm: gradients are clipped to.
            policy_kwargs: of SB3's policy class.
            tensorboard_log: folder of the log, or None.
            seed: of everything.
            device: ``cpu``, where the simulator is.

        Raises:
            BiscaleError: a value that is not possible.
        """
        counts = {
            "n_steps": n_steps,
            "sample_every": sample_every,
            "rounds_kept": rounds_kept,
            "n_epochs": n_epochs,
            "batch_size": batch_size,
        }
        _check_settings(counts, explore_share, device)
        check_tries(clocks, horizon_s)
        super().__init__(
            policy,
            env,
            learning_rate,
            n_steps=1,  # of SB3's own buffer, which stays unused
            gamma=1.0,
            gae_lambda=1.0,
            ent_coef=0.0,
            vf_coef=0.0,
            max_grad_norm=max_grad_norm,
            use_sde=False,
            sde_sample_freq=-1,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            seed=seed,
            device="cpu",
            _init_setup_model=False,
        )
        self.steps_per_round, self.sample_every = n_steps, sample_every
        self.clocks, self.horizon_s = clocks, tuple(horizon_s)
        self.sigma_first, self.sigma_last = two_above_0("sigma", sigma)
        self._left = 1.0  # of training, when the round began
        self.explore_share, self.rounds_kept = explore_share, rounds_kept
        self.n_epochs, self.batch_size = n_epochs, batch_size
        self.rounds = ()
        self._costs: ClockCosts | None = None
        if _init_setup_model:
            self._setup_model()

    def _excluded_save_params(self) -> list[str]:
        """What a checkpoint leaves out: the samples are kept with the state of a run."""
        return [*super()._excluded_save_params(), "rounds", "_costs"]

    @property
    def sigma(self) -> float:
        """Width of :func:`expected_cost` in the present round."""
        return self.sigma_last + (self.sigma_first - self.sigma_last) * self._left

    def act(self, features: Floats32) -> Floats32:
        """Outputs of the network without exploration, clipped, (n,)."""
        with torch.no_grad():
            mean = self._mean(torch.as_tensor(features))
        return np.asarray(mean.numpy()).clip(-1.0, 1.0)

    def _mean(self, features: torch.Tensor) -> torch.Tensor:
        policy = self.policy
        return policy.action_net(policy.mlp_extractor.policy_net(features))[:, 0]  # type: ignore[operator, union-attr, no-any-return]

    def _exploring(self, features: Floats32) -> Floats32:
        """Outputs with the policy's own noise in some rows, (n,)."""
        with torch.no_grad():
            mean = self._mean(torch.as_tensor(features))
            std = self.policy.log_std.exp()  # type: ignore[operator, union-attr]
            noise = std * torch.randn(len(mean))
            mean = mean + noise * (torch.rand(len(mean)) < self.explore_share)
        return np.asarray(mean.numpy()).clip(-1.0, 1.0)

    def collect_rollouts(
        self, env: Any, callback: Any, rollout_buffer: Any, n_rollout_steps: int
    ) -> bool:
        """Run the policy for a round, and ask for costs in every few states.

        Raises:
            BiscaleError: another environment than that of training.
        """
        if not isinstance(env, AgentVecEnv):
            raise BiscaleError(
                "policy_iteration copies states of the project's training environment: start it "
                "with biscale train"
            )
        if self._costs is None:
            self._costs = ClockCosts(env, self.clocks, self.horizon_s)
        self.policy.set_training_mode(False)
        # SB3 moves this on before train(): the last round would learn at a rate of 0
        self._left = max(self._current_progress_remaining, 0.0)
        callback.on_rollout_start()
        kept: list[CostSamples] = []
        for step in range(self.steps_per_round):
            features = np.asarray(self._last_obs, dtype=np.float32)
            if step % self.sample_every == 0:
                kept.append(self._samples(env, features))
            observed, _, dones, infos = env.step(self._exploring(features))
            self._last_obs, self._last_episode_starts = np.asarray(observed), dones
            self.num_timesteps += env.num_envs
            callback.update_locals(locals())
            if not callback.on_step():
                return False
            self._update_info_buffer(infos, dones)
        whole = CostSamples(*(np.concatenate(column) for column in zip(*kept, strict=True)))
        self.rounds = (*self.rounds, whole)[-self.rounds_kept :]
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _samples(self, env: AgentVecEnv, features: Floats32) -> CostSamples:
        assert self._costs is not None
        cost, whole = self._costs(self.act)
        above = cost - cost.mean(axis=1, keepdims=True)
        return CostSamples(
            features[whole].copy(),
            env.rule[whole].copy(),
            above[whole].astype(np.float32),
            env.meter.cells(env.group, env.price)[whole],
        )

    def train(self) -> None:
        """Fit the actor to the samples of the last rounds."""
        self.policy.set_training_mode(True)
        optimiser = self.policy.optimizer
        rate = self.lr_schedule(self._left)
        update_learning_rate(optimiser, rate)
        assert self._costs is not None
        features, rule, cost, cell = (
            np.concatenate(column) for column in zip(*self.rounds, strict=True)
        )
        x, base = torch.as_tensor(features), torch.as_tensor(rule)
        costs = torch.as_tensor(scaled_costs(cost, cell))
        clocks, actions, total = torch.as_tensor(self._costs.actions), self._costs.map, 0.0
        sigma = self.sigma
        for _ in range(self.n_epochs):
            total = 0.0
            for part in torch.randperm(len(x)).split(self.batch_size):
                output = self._mean(x[part])
                inside = output.clamp(-1.0, 1.0)  # as it is when it decides
                action = actions.unclipped(inside, base[part])
                loss = expected_cost(action, clocks, costs[part], sigma).mean()
                loss = loss + OVERSHOOT * ((output - inside) ** 2).mean()
                optimiser.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
                optimiser.step()
                total += loss.item() * len(part)
        self._n_updates += self.n_epochs
        self.logger.record("train/expected_cost", total / len(x))
        self.logger.record("train/samples", len(x))
        self.logger.record("train/sigma", sigma)
        self.logger.record("train/learning_rate", rate)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
