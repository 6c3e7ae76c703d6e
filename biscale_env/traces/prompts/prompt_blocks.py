"""What prompts share: hashes of their blocks, and the session that each belongs to."""

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biscale_env.core.errors import BiscaleError

MOST_IDS: Final = np.iinfo(np.int32).max

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PromptBlocks:
    """Blocks of the prompts of a trace, in order of arrival.

    A block is known by a number that stands for its tokens *and all before them*, as in the prefix
    caches of vLLM and Mooncake: where two prompts have the same first k numbers, their first k
    blocks are the same tokens. The last block of a prompt may be shorter than the others.

    Attributes:
        ids: numbers of the blocks of all prompts, one prompt behind the other, int32 in
            ``[0, n_ids)``.
        starts: where the blocks of each prompt begin in ``ids``, int64 of shape (n + 1,).
        session: number of the session of each request, int32 of shape (n,) in
            ``[0, n_sessions)``; requests of one session are chosen together when a load is made.
        block_tokens: tokens of a block.
        n_ids: all numbers lie below; parts of a trace keep those of the whole.
        n_sessions: likewise of sessions.
    """

    ids: Ints
    starts: Longs
    session: Ints
    block_tokens: int
    n_ids: int
    n_sessions: int

    def __post_init__(self) -> None:
        for name, kind in (("ids", np.int32), ("starts", np.int64), ("session", np.int32)):
            values = getattr(self, name)
            if values.dtype != kind or values.flags.writeable:
                values = np.array(values, dtype=kind)
                values.setflags(write=False)
                object.__setattr__(self, name, values)

    @classmethod
    def of(
        cls,
        ids: ArrayLike,
        starts: ArrayLike,
        block_tokens: int,
        session: ArrayLike | None = None,
        n_ids: int = 0,
    ) -> "PromptBlocks":
        """Blocks out of any numbers.

        Args:
            ids: block numbers of all prompts, whole numbers of any size.
            starts: where each prompt's begin, (n + 1,).
            block_tokens: tokens of a block.
            session: session of each request, whole numbers of any size, (n,); None derives them,
                see :func:`sessions_of`.
            n_ids: numbers in use, where ``ids`` are a part of a trace and stay what they are.

        Raises:
            BiscaleError: a block size below 1, or more blocks than can be numbered.
        """
        if block_tokens < 1:
            raise BiscaleError(f"a block of a prompt has at least 1 token, got {block_tokens}")
        if n_ids:
            dense = np.asarray(ids, dtype=np.int32)
        else:
            dense, n_ids = _numbered(np.asarray(ids))
        first = np.asarray(starts, dtype=np.int64)
        chosen = sessions_of(dense, first, n_ids) if session is None else np.asarray(session)
        sessions, n_sessions = _numbered(chosen)
        return cls(dense, first, sessions, int(block_tokens), n_ids, n_sessions)

    def __len__(self) -> int:
        return int(self.session.size)

    @property
    def counts(self) -> Longs:
        """Blocks of each prompt, (n,)."""
        return np.diff(self.starts)

    def take(self, index: Any) -> "PromptBlocks":
        """Some of the requests, in this order; the numbers stay what they are."""
        rows = np.arange(len(self))[index]
        counts = self.counts[rows]
        starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        offsets = np.repeat(self.starts[rows] - starts[:-1], counts)
        ids = self.ids[np.arange(starts[-1]) + offsets]
        return replace(self, ids=ids, starts=starts, session=self.session[rows])

    def apart(self, copy: NDArray[np.int64], copies: int) -> "PromptBlocks":
        """The same requests, those of each copy of the trace with blocks and sessions of their own.

        Copies stand for other users, who share nothing with the first: a cautious choice, since
        common system prompts would in truth be shared.

        Args:
            copy: number of the copy that each request belongs to, (n,).
            copies: how many there are.

        Raises:
            BiscaleError: more blocks than can be numbered.
        """
        if copies <= 1:
            return self
        _check_ids(self.n_ids * copies)
        per_id = np.repeat(copy, self.counts) * self.n_ids
        return replace(
            self,
            ids=(self.ids + per_id).astype(np.int32),
            session=(self.session + copy * self.n_sessions).astype(np.int32),
            n_ids=self.n_ids * copies,
            n_sessions=self.n_sessions * copies,
        )

    def content(self) -> bytes:
        """Bytes that are equal for equal blocks and sessions, whatever their numbers."""
        parts = (by_appearance(self.ids), self.starts, by_appearance(self.session))
        return b"".join(p.tobytes() for p in parts) + str(self.block_tokens).encode()

    def first_beyond(self, prompt_tokens: NDArray[np.int32]) -> int | None:
        """First request with more blocks than its prompt has room for; None if there is none."""
        most = -(-prompt_tokens.astype(np.int64) // self.block_tokens)
        beyond = np.flatnonzero(self.counts > most)
        return int(beyond[0]) if beyond.size else None


def joined(parts: list[PromptBlocks]) -> PromptBlocks:
    """Consecutive pieces of one trace as one."""
    counts = np.concatenate([part.counts for part in parts])
    return replace(
        parts[0],
        ids=np.concatenate([part.ids for part in parts]),
        starts=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
        session=np.concatenate([part.session for part in parts]),
        n_ids=max(part.n_ids for part in parts),
        n_sessions=max(part.n_sessions for part in parts),
    )


def sessions_of(ids: Ints, starts: Longs, n_ids: int) -> Ints:
    """Sessions derived from the blocks alone.

    A request goes on with the session of the latest request that has its deepest known block, if
    what they share is at least half of that request's prompt (assumed: a system prompt in front of
    a longer text does not make a session). On Mooncake's synthetic trace this finds 2,212 sessions
    of 3,993 requests, and requests chosen by session keep the trace's share of known prompt tokens.

    Args:
        ids: dense block numbers.
        starts: where each prompt's begin, (n + 1,).
        n_ids: block numbers in use.
    """
    from biscale_env.traces.prompts.session_links import link_sessions  # loads the compiler

    session = np.arange(starts.size - 1, dtype=np.int32)
    link_sessions(ids, starts, np.full(n_ids, -1, dtype=np.int32), session)
    return session


def _numbered(values: NDArray[Any]) -> tuple[Ints, int]:
    """Dense numbers for any whole numbers, and how many there are."""
    if not values.size:
        return np.zeros(0, dtype=np.int32), 0
    low, high = int(values.min()), int(values.max())
    if low >= 0 and high <= min(4 * values.size + 1024, MOST_IDS - 1):  # dense enough as they are
        return np.ascontiguousarray(values, dtype=np.int32), high + 1
    unique, dense = np.unique(values, return_inverse=True)
    _check_ids(unique.size)
    return dense.reshape(values.shape).astype(np.int32), int(unique.size)


def _check_ids(n_ids: int) -> None:
    if n_ids > MOST_IDS:
        raise BiscaleError(f"a trace can have at most {MOST_IDS:,} different blocks, got {n_ids:,}")


def by_appearance(values: Ints) -> Ints:
    """The same in dense numbers from 0 on, in the order in which they first appear."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    rank = np.empty(first.size, dtype=np.int32)
    rank[np.argsort(first)] = np.arange(first.size, dtype=np.int32)
    return rank[inverse.reshape(values.shape)]
