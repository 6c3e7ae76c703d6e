"""Requests in sessions: turns of chats, or questions about one document, that share their prompts.

Arrival times are those of the workload's own process. At each of them the session whose next turn
is due for longest goes on; where none is due a new one begins. So rate and bursts are as asked for,
whatever the sessions are like, and a workload begins without sessions from before.
"""

import heapq
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from biscale_env.traces.prompts.prompt_blocks import PromptBlocks
from biscale_env.traces.synthetic.lengths import InverseCdf, LengthSampler
from biscale_env.traces.synthetic.profiles import LengthProfile, Sessions


class SessionRequests(NamedTuple):
    """Lengths and blocks of requests, in order of arrival."""

    prompt: NDArray[np.int32]
    output: NDArray[np.int32]
    blocks: PromptBlocks


@dataclass
class _Session:
    """A session so far: what its next prompt begins with, and how many turns are left."""

    number: int
    prompt: int
    output: int
    kept: int  # tokens that the next prompt begins with
    turns: int
    ids: list[int] = field(default_factory=list)


class SessionSampler:
    """Makes the requests of sessions."""

    def __init__(self, sessions: Sessions, single: LengthSampler, several: LengthProfile) -> None:
        """Prepare the distributions.

        Args:
            sessions: how requests belong together.
            single: lengths of sessions with one turn.
            several: lengths of the first turn of the others.
        """
        self.sessions = sessions
        self._single, self._several = single, LengthSampler.of(several)
        self._message = InverseCdf.of(sessions.message_tokens)

    def sample(self, arrival_s: NDArray[np.float64], rng: np.random.Generator) -> SessionRequests:
        """Lengths and blocks of requests that arrive at these times.

        Args:
            arrival_s: rising times, (n,), s.
            rng: source of randomness.
        """
        n, s = arrival_s.size, self.sessions
        drawn = _Drawn.of(self, n, rng)
        made = _Blocks(s.block_tokens, s.system_prompts, s.system_tokens)
        due: list[tuple[float, int, _Session]] = []
        prompt, output = np.zeros(n, dtype=np.int32), np.zeros(n, dtype=np.int32)
        owner, begun = np.zeros(n, dtype=np.int64), 0
        for i in range(n):
            shared = 0
            if due and due[0][0] <= arrival_s[i]:
                session = heapq.heappop(due)[2]
                shared = min(session.kept, session.prompt)
                session.prompt = session.kept + int(drawn.message[i])
                session.output = int(drawn.output[i])
                session.turns -= 1
            else:
                session = self._begin(begun, i, drawn)
                begun += 1
            made.add(session, shared, int(drawn.system[session.number]))
            prompt[i], output[i], owner[i] = session.prompt, session.output, session.number
            if s.grows:
                session.kept = session.prompt + session.output
            if session.turns > 0 and session.kept < s.longest_tokens:
                heapq.heappush(due, (arrival_s[i] + drawn.think_s[i], i, session))
        blocks = PromptBlocks.of(np.array(made.ids), np.array(made.starts), s.block_tokens, owner)
        return SessionRequests(prompt, output, blocks)

    def _begin(self, number: int, i: int, drawn: "_Drawn") -> _Session:
        """A new session; what its user says first is behind the system prompt or the document."""
        if drawn.turns[i] == 0:
            prompt = int(drawn.single[0][i]) + self.sessions.system_tokens
            return _Session(number, prompt, int(drawn.single[1][i]), 0, 0)
        prompt = int(drawn.several[0][i]) + self.sessions.system_tokens
        kept = max(prompt - int(drawn.message[i]), self.sessions.system_tokens)
        return _Session(number, prompt, int(drawn.output[i]), kept, int(drawn.turns[i]))


class _Drawn(NamedTuple):
    """All random numbers of ``n`` requests; each has those of every role that it may play."""

    single: tuple[NDArray[np.int32], NDArray[np.int32]]
    several: tuple[NDArray[np.int32], NDArray[np.int32]]
    output: NDArray[np.int32]
    message: NDArray[np.int32]
    turns: NDArray[np.int64]  # further turns of a session that begins here
    think_s: NDArray[np.float64]
    system: NDArray[np.int64]

    @classmethod
    def of(cls, sampler: SessionSampler, n: int, rng: np.random.Generator) -> "_Drawn":
        s = sampler.sessions
        single, several = sampler._single.sample(n, rng), sampler._several.sample(n, rng)
        message = sampler._message.at(rng.random(n))
        further = rng.geometric(1.0 / (s.turns_mean - 1.0), n)
        turns = np.where(rng.random(n) < s.repeated_share, further, 0)
        shape = 1.0 / s.think_cv**2
        think_s = rng.gamma(shape, s.think_mean_s / shape, n)
        system = rng.integers(0, max(s.system_prompts, 1), n)
        return cls(single, several, several[1], message, turns, think_s, system)


class _Blocks:
    """Numbers the blocks of prompts."""

    def __init__(self, block_tokens: int, system_prompts: int, system_tokens: int) -> None:
        whole = system_tokens // block_tokens
        self.size, self.system_tokens = block_tokens, system_tokens
        self.system = [list(range(k * whole, (k + 1) * whole)) for k in range(system_prompts)]
        self.ids: list[int] = []
        self.starts = [0]
        self.made = whole * system_prompts

    def add(self, session: _Session, shared: int, system: int) -> None:
        """Append the blocks of the session's prompt.

        Its first ``shared`` tokens are those of the prompt before it, or a system prompt.
        """
        known = session.ids[: shared // self.size]
        if not known and self.system:
            known = self.system[system]
        fresh = -(-session.prompt // self.size) - len(known)
        session.ids = known + list(range(self.made, self.made + fresh))
        self.made += fresh
        self.ids += session.ids
        self.starts.append(len(self.ids))
