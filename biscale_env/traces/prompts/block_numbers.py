"""From hashes and sessions of a file, piece by piece, to the numbered blocks of a trace."""

import warnings
from collections.abc import Hashable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleWarning
from biscale_env.traces.checks import Where
from biscale_env.traces.prompts.prompt_blocks import PromptBlocks
from biscale_env.traces.prompts.raw_blocks import RawBlocks

SIZES: Final = tuple(2**k for k in range(2, 15))  # tokens of a block that a file may have
CHAT_BLOCK_TOKENS: Final = 16  # vLLM's default, for sessions whose blocks nobody hashed
ENOUGH_ROWS: Final = 8  # whose lengths are no coincidence
NO_SESSION: Final = -1


class BlockNumbers:
    """Numbers blocks and sessions of a file alike from its first piece to its last.

    Attributes:
        block_tokens: tokens of a block; 0 until the first piece was seen.
        is_told: whether sessions stand in the file.
        is_hashed: whether hashes do.
    """

    def __init__(self, path: str, documented: int | None, told: int | None = None) -> None:
        """Begin a file.

        Args:
            path: for messages.
            documented: tokens of a block, as the authors of the format say; None: by the lengths.
            told: likewise, as the user or the file itself says, whatever the lengths say.
        """
        self._path, self._documented, self._told = path, documented, told
        self.block_tokens, self.is_told, self.is_hashed = 0, False, False
        self._ids: dict[Hashable, int] = {}
        self._sessions: dict[Hashable, int] = {}
        self._ends: dict[int, tuple[int, int, list[int]]] = {}
        self._made, self._chats = 0, 0
        self._warned = False

    def blocks(
        self, raw: RawBlocks, prompt: NDArray[np.int32], output: NDArray[np.int32], where: Where
    ) -> PromptBlocks | None:
        """Blocks of the next piece; None where its hashes fit no block size.

        Args:
            raw: what the file says.
            prompt: checked lengths.
            output: likewise.
            where: names a row.
        """
        session = self._session(raw)
        if raw.ids is None:
            if session is None:
                return None
            return self._of_sessions(session, prompt, output)
        counts = np.diff(raw.starts)
        if not self.block_tokens:
            self.block_tokens = self._size(counts, prompt)
        if not self.block_tokens:
            return None
        self.is_hashed = True
        fitting = np.minimum(counts, -(-prompt.astype(np.int64) // self.block_tokens))
        if (beyond := np.flatnonzero(fitting < counts)).size:
            self._warn(where(int(beyond[0])), int(prompt[beyond[0]]), int(counts[beyond[0]]))
        starts = np.concatenate([[0], np.cumsum(fitting, dtype=np.int64)])
        offsets = np.repeat(raw.starts[:-1] - starts[:-1], fitting)
        ids = _numbered(raw.ids[np.arange(starts[-1]) + offsets], self._ids)
        return self._made_of(ids, starts, session, len(self._ids))

    def _made_of(
        self,
        ids: NDArray[np.int32],
        starts: NDArray[np.int64],
        session: NDArray[np.int32] | None,
        n_ids: int,
    ) -> PromptBlocks:
        if session is None:
            session = np.full(starts.size - 1, NO_SESSION, dtype=np.int32)
        return PromptBlocks(ids, starts, session, self.block_tokens, n_ids, len(self._sessions))

    def _session(self, raw: RawBlocks) -> NDArray[np.int32] | None:
        if raw.session is None:
            return None
        self.is_told = True
        if raw.before is None:
            return _numbered(raw.session, self._sessions)
        numbers = np.empty(raw.session.size, dtype=np.int32)
        turns = zip(raw.session.tolist(), raw.before.tolist(), strict=True)
        for i, (turn, before) in enumerate(turns):
            number = self._sessions.get(before, self._chats)
            self._chats = max(self._chats, number + 1)
            numbers[i] = self._sessions.setdefault(turn, number)
        return numbers

    def _size(self, counts: NDArray[np.int64], prompt: NDArray[np.int32]) -> int:
        """Tokens of a block: as told, as documented, or what the lengths of all rows agree with.

        Mooncake's keys are written with blocks of other sizes too: where no row contradicts
        another, the lengths are believed rather than the documentation.
        """
        has = counts > 0
        if self._told is not None or not has.any():
            return self._told or self._documented or CHAT_BLOCK_TOKENS
        counts, prompt = counts[has], prompt[has]
        if self._documented is not None and _may_be(counts, prompt, self._documented):
            return self._documented
        found = _sizes(counts, prompt)
        if len(found) == 1 or self._documented is not None:
            return found[0] if len(found) == 1 else int(self._documented or 0)
        shown = " or ".join(str(size) for size in found)
        fault = (
            f"agree with blocks of {shown} tokens"
            if found
            else f"agree with no block size from {SIZES[0]} to {SIZES[-1]} tokens"
        )
        warnings.warn(
            f"hash_ids of {self._path} {fault}: a prefix cache cannot use them; --block-tokens "
            "says the size",
            BiscaleWarning,
            stacklevel=4,
        )
        return 0

    def _warn(self, where: str, prompt: int, count: int) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{where}: {count} hash_ids are more than a prompt of {prompt} tokens has blocks "
                f"of {self.block_tokens}; those beyond are left out (--block-tokens says another "
                "size)",
                BiscaleWarning,
                stacklevel=4,
            )

    def _of_sessions(
        self, session: NDArray[np.int32], prompt: NDArray[np.int32], output: NDArray[np.int32]
    ) -> PromptBlocks:
        """Blocks of sessions that nobody hashed.

        A turn at least as long as the prompt and the answer before it begins with that prompt.
        """
        self.block_tokens = size = CHAT_BLOCK_TOKENS
        pieces: list[list[int]] = []
        rows = zip(session.tolist(), prompt.tolist(), output.tolist(), strict=True)
        for number, tokens, answer in rows:
            before, answered, known = self._ends.get(number, (0, 0, []))
            kept = known[: before // size] if tokens >= before + answered else []
            fresh = -(-tokens // size) - len(kept)
            ids = kept + list(range(self._made, self._made + fresh))
            self._made += fresh
            self._ends[number] = (tokens, answer, ids)
            pieces.append(ids)
        counts = np.array([len(ids) for ids in pieces], dtype=np.int64)
        flat = np.array([b for ids in pieces for b in ids], dtype=np.int32)
        starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        return self._made_of(flat, starts, session, self._made)


def _agree(counts: NDArray[np.int64], prompt: NDArray[np.int32], size: int) -> bool:
    """Whether all rows have as many hashes as their prompts have blocks, the last one or not."""
    return bool(((counts == prompt // size) | (counts == -(-prompt // size))).all())


def _may_be(counts: NDArray[np.int64], prompt: NDArray[np.int32], size: int) -> bool:
    """Whether the documented size may be right: too many hashes, or many rows, speak against it."""
    too_many = bool((counts > -(-prompt // size)).any())
    return _agree(counts, prompt, size) or (not too_many and counts.size < ENOUGH_ROWS)


def _sizes(counts: NDArray[np.int64], prompt: NDArray[np.int32]) -> list[int]:
    """Sizes with which the lengths agree.

    An engine hashes the last block of a prompt, which is rarely full, always or never; only where
    no size agrees so may it be now one, now the other.
    """
    always = [size for size in SIZES if (counts == -(-prompt // size)).all()]
    never = [size for size in SIZES if (counts == prompt // size).all()]
    strict = sorted({*always, *never})
    return strict or [size for size in SIZES if _agree(counts, prompt, size)]


def finished(blocks: PromptBlocks | None) -> PromptBlocks | None:
    """Blocks of a whole trace: where its file says nothing of sessions they are derived."""
    if blocks is not None and not blocks.ids.size and len(blocks):  # lists that are all empty
        return None
    if blocks is None or not len(blocks) or blocks.session[0] != NO_SESSION:
        return blocks
    return PromptBlocks.of(blocks.ids, blocks.starts, blocks.block_tokens, None, blocks.n_ids)


def _numbered(values: NDArray[Any], known: dict[Hashable, int]) -> NDArray[np.int32]:
    """Number of each value; new ones get the next."""
    if not values.size:
        return np.zeros(0, dtype=np.int32)
    if values.dtype == object:
        numbers = [known.setdefault(value, len(known)) for value in values.tolist()]
        return np.array(numbers, dtype=np.int32)
    unique, inverse = np.unique(values, return_inverse=True)
    mapped = [known.setdefault(value, len(known)) for value in unique.tolist()]
    return np.array(mapped, dtype=np.int32)[inverse]
