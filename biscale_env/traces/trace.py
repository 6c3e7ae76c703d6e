"""The `Trace`: when requests arrive and how long they are; windows, splits and loads made of it."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.traces.checks import MAX_REQUESTS, RowName, check_lengths, check_times
from biscale_env.traces.prompts.prompt_blocks import PromptBlocks, by_appearance
from biscale_env.traces.request_classes import RequestClasses


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in order of arrival.

    Arrays are read-only, so one trace may be shared by many environments.

    Attributes:
        name: short name used in tables.
        arrival_s: arrival times, float64 of shape (n,), s; sorted, the first at or after 0.
        prompt_tokens: prompt lengths, int32 of shape (n,), at least 1.
        output_tokens: output lengths, int32 of shape (n,), at least 1: prefill itself makes the
            first token.
        source: where the requests come from: file, generator or citation.
        duration_s: length of time that was observed, s; 0 (default) stands for "up to the last
            arrival".
        first_line: line of the file that holds request 0, for error messages; 0 where there is no
            such file.
        blocks: sessions, and hashes of the blocks of every prompt, for prefix caches; None where
            nobody says what prompts share.
        classes: SLO class of every request; None where nobody says.

    Raises:
        BiscaleError: on construction, when a value breaks one of these rules; it names the request
            and the field.
    """

    name: str
    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    source: str
    duration_s: float = 0.0
    first_line: int = 0
    blocks: PromptBlocks | None = None
    classes: RequestClasses | None = None

    def __post_init__(self) -> None:
        arrival_s = _own(self.arrival_s, np.float64)
        where = RowName(self.name, self.first_line)
        columns: dict[str, NDArray[Any]] = {"arrival_s": arrival_s}
        for field in ("prompt_tokens", "output_tokens"):
            columns[field] = np.asarray(getattr(self, field))
        if any(c.ndim != 1 or c.shape != arrival_s.shape for c in columns.values()):
            raise BiscaleError(
                f"{self.name}: arrival_s, prompt_tokens and output_tokens must be one-dimensional "
                "and equally long"
            )
        check_times(arrival_s, where)
        for field in ("prompt_tokens", "output_tokens"):
            check_lengths(columns[field], field, where)
            columns[field] = _own(columns[field], np.int32)
        for field, values in columns.items():
            values.setflags(write=False)
            object.__setattr__(self, field, values)
        last_s = float(arrival_s[-1]) if arrival_s.size else 0.0
        duration_s = float(self.duration_s) or last_s
        if not last_s <= duration_s < np.inf:
            raise BiscaleError(
                f"{self.name}: duration_s {duration_s:g} must not lie before the last arrival at "
                f"{last_s:g} s"
            )
        object.__setattr__(self, "duration_s", duration_s)
        if self.blocks is not None:
            self._check_blocks(self.blocks, where)
        if self.classes is not None and len(self.classes) != len(self):
            raise BiscaleError(
                f"{self.name}: classes of {len(self.classes)} requests for {len(self)}"
            )

    def _check_blocks(self, blocks: PromptBlocks, where: RowName) -> None:
        if len(blocks) != len(self):
            raise BiscaleError(
                f"{self.name}: blocks of {len(blocks)} prompts for {len(self)} requests"
            )
        if (i := blocks.first_beyond(self.prompt_tokens)) is not None:
            raise BiscaleError(
                f"{where(i)}: {blocks.counts[i]} blocks of {blocks.block_tokens} tokens are more "
                f"than a prompt of {self.prompt_tokens[i]} has"
            )

    def __len__(self) -> int:
        return int(self.arrival_s.size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Trace) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    @property
    def rate_rps(self) -> float:
        """Mean request rate over the observed time, requests per s (0 for an empty trace)."""
        return len(self) / self.duration_s if self.duration_s > 0 else 0.0

    @property
    def sha256(self) -> str:
        """Hex digest of the requests, what they share and are promised, and the duration.

        Not of the name.

        The same work has the same digest.
        """
        parts = (
            self.arrival_s,
            self.prompt_tokens,
            self.output_tokens,
            np.float64(self.duration_s),
        )
        shared = self.blocks.content() if self.blocks is not None else b""
        promised = self.classes.content() if self.classes is not None else b""
        content = b"".join(part.tobytes() for part in parts) + shared + promised
        return hashlib.sha256(content).hexdigest()

    def without_blocks(self) -> "Trace":
        """The same requests without what is known of their prompts, as a prefix cache needs it."""
        return self if self.blocks is None else replace(self, blocks=None)

    def window(self, start_s: float, end_s: float) -> "Trace":
        """Requests that arrive in ``[start_s, end_s)``, with times counted from ``start_s``.

        A window that reaches the end of the trace includes the last request.

        Raises:
            BiscaleError: the window is empty or lies outside the trace.
        """
        if not 0 <= start_s < end_s or start_s >= max(self.duration_s, np.finfo(float).tiny):
            raise BiscaleError(
                f"window {start_s:g} to {end_s:g} s does not lie within {self.name}, which lasts "
                f"{self.duration_s:g} s"
            )
        whole = end_s >= self.duration_s
        first = int(np.searchsorted(self.arrival_s, start_s, side="left"))
        stop = len(self) if whole else int(np.searchsorted(self.arrival_s, end_s, side="left"))
        label = f"{self.name}[{start_s:g}:{min(end_s, self.duration_s):g}s]"
        cut = self._take(
            slice(first, stop),
            self.arrival_s[first:stop] - start_s,
            min(end_s, self.duration_s) - start_s,
            label,
        )
        return replace(cut, first_line=self.first_line + first if self.first_line else 0)

    def split(self, fraction: float) -> tuple["Trace", "Trace"]:
        """Cut in time: the first ``fraction`` of the duration, and the rest.

        The first part is for tuning, the second for tables. Both start at time 0.

        Raises:
            BiscaleError: the fraction is not strictly between 0 and 1.
        """
        if not 0 < fraction < 1:
            raise BiscaleError(
                f"{self.name}: a split needs a fraction between 0 and 1, got {fraction:g}"
            )
        cut_s = fraction * self.duration_s
        return self.window(0.0, cut_s), self.window(cut_s, self.duration_s)

    def scaled_to(self, rate_rps: float, seed: int) -> "Trace":
        """The same workload at another mean rate, by choosing requests; time is never stretched.

        With m = ``rate_rps`` / own rate: floor(m) complete copies, and of one more copy each
        request with probability m - floor(m). The first copy keeps its times, every further one is
        shifted circularly by its own random offset, so that bursts do not line up. For one seed the
        requests of a lower rate are a subset of those of a higher one: a search over the load is
        monotone in the work. Where sessions are known whole sessions are chosen, since a part of
        them would find less in a prefix cache; further copies share no block with the first.

        Args:
            rate_rps: wanted mean rate, requests per s.
            seed: every choice follows from it.

        Raises:
            BiscaleError: the rate is not positive and finite, the seed is negative, or the trace is
                empty.
        """
        if not 0 < rate_rps < np.inf:
            raise BiscaleError(
                f"{self.name}: a request rate must be positive, got {rate_rps:g} requests/s"
            )
        if self.rate_rps == 0:
            raise BiscaleError(
                f"{self.name}: a trace without requests or without duration has no rate to scale"
            )
        if seed < 0:
            raise BiscaleError(
                f"{self.name}: a seed must be a whole number of at least 0, got {seed}"
            )
        multiple = rate_rps / self.rate_rps
        copies = _copies(multiple)
        if copies * len(self) > MAX_REQUESTS:
            raise BiscaleError(
                f"{self.name}: {rate_rps:g} requests/s is {multiple:.3g} times its own rate: over "
                f"{MAX_REQUESTS} requests"
            )
        times, rows, copy_of = [], [], []
        for copy, child in enumerate(np.random.SeedSequence(seed).spawn(copies)):
            rng = np.random.default_rng(child)
            offset_s = _offset_s(rng, copy, self.duration_s)
            kept = self._chosen(rng, multiple - copy)
            shifted = self.arrival_s[kept] + offset_s
            times.append(np.where(shifted > self.duration_s, shifted - self.duration_s, shifted))
            rows.append(kept)
            copy_of.append(np.full(kept.size, copy, dtype=np.int64))
        all_times, all_rows = np.concatenate(times), np.concatenate(rows)
        order = np.argsort(all_times, kind="stable")
        scaled = self._take(
            all_rows[order], all_times[order], self.duration_s, f"{self.name}@{rate_rps:.4g}rps"
        )
        if scaled.blocks is not None:
            apart = scaled.blocks.apart(np.concatenate(copy_of)[order], copies)
            scaled = replace(scaled, blocks=apart)
        return replace(scaled, source=f"{self.source}; {multiple:.4g} x its rate, seed {seed}")

    def _chosen(self, rng: np.random.Generator, probability: float) -> NDArray[np.intp]:
        """Rows of a copy: each request, or each session, with this probability."""
        if self.blocks is None:
            return np.flatnonzero(rng.random(len(self)) < probability)
        session = by_appearance(self.blocks.session)  # whatever the numbers are
        return np.flatnonzero(rng.random(len(self))[session] < probability)

    def copies_at(self, rate_rps: float, seed: int) -> tuple[tuple[float, float], ...]:
        """What :meth:`scaled_to` puts together: offset (s) and share of the requests of each copy.

        Args:
            rate_rps: wanted mean rate, requests per s.
            seed: as there.
        """
        multiple = rate_rps / self.rate_rps
        children = np.random.SeedSequence(seed).spawn(_copies(multiple))
        return tuple(
            (
                _offset_s(np.random.default_rng(child), copy, self.duration_s),
                min(multiple - copy, 1.0) / multiple,
            )
            for copy, child in enumerate(children)
        )

    def check_fits(self, max_tokens: int, with_output: bool = True) -> "Trace":
        """Return the trace if every request fits into a KV cache (or context) of ``max_tokens``.

        Args:
            max_tokens: KV cache that one request may fill, tokens.
            with_output: count the output too (it stays in the cache while it is made); without,
                only the prompt.

        Raises:
            BiscaleError: names the first request (and its line, where known) that does not fit.
        """
        need = self.prompt_tokens.astype(np.int64) + (self.output_tokens if with_output else 0)
        bad = np.flatnonzero(need > max_tokens)
        if bad.size:
            i = int(bad[0])
            parts = f"prompt_tokens {self.prompt_tokens[i]}" + (
                f" + output_tokens {self.output_tokens[i]}" if with_output else ""
            )
            where = RowName(
                self.source.split(";")[0] if self.first_line else self.name, self.first_line
            )
            raise BiscaleError(
                f"{where(i)}: {parts} do not fit into {max_tokens} tokens of KV room"
            )
        return self

    def _take(
        self, index: Any, arrival_s: NDArray[np.float64], duration_s: float, name: str
    ) -> "Trace":
        """Some of the requests, at other times.

        Every choice of requests goes through here, so that a further column has one place.
        """
        prompt, output = self.prompt_tokens[index], self.output_tokens[index]
        blocks = self.blocks.take(index) if self.blocks is not None else None
        classes = self.classes.take(index) if self.classes is not None else None
        return Trace(
            name,
            arrival_s,
            prompt,
            output,
            self.source,
            duration_s=duration_s,
            blocks=blocks,
            classes=classes,
        )


def _copies(multiple: float) -> int:
    """Copies of a trace, the last of them in part, that a multiple of its rate needs."""
    return int(np.ceil(multiple))


def _offset_s(rng: np.random.Generator, copy: int, duration_s: float) -> float:
    """By how much a copy is shifted circularly, s; the first one keeps its times."""
    return float(rng.uniform(0.0, duration_s)) if copy else 0.0


def _own(values: Any, dtype: type[np.generic]) -> NDArray[Any]:
    """An array that no one else can write to.

    A copy, unless it is read-only and of the right type already.
    """
    if isinstance(values, np.ndarray) and values.dtype == dtype and not values.flags.writeable:
        return values
    return np.array(values, dtype=dtype)
