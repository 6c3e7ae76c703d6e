"""One request of a replay, as the client saw it."""

import math

import msgspec

INTERRUPTED_ERROR = "cut off: the replay ended before the answer"
GONE_ERROR = "cut off: the engine is gone"
# Reads of one piece lie microseconds apart; the fastest decode iterations take some milliseconds
# (assumed: no engine makes two tokens within PIECE_S, nor ten in a row at ten per PIECE_S)
PIECE_S = 1e-3
PIECE_TOKENS = 10


class RequestRecord(msgspec.Struct):
    """One request, as the client saw it.

    Times are CLOCK_MONOTONIC seconds, NaN (null) where something did not happen.

    Attributes:
        index: row of the trace.
        scheduled_s: when the trace wanted it to leave.
        dispatched_s: when it left.
        prefill_done_s: prefill engine had answered, and not with an error.
        decode_sent_s: the decode request left.
        first_chunk_s: first token of the stream.
        last_chunk_s: last token of the stream.
        prompt_tokens: asked for.
        output_tokens: asked for.
        completion_tokens: made, by the server's usage; -1 unknown.
        chunks: events of the stream that held tokens.
        longest_gap_s: longest time between two of them.
        error: why it failed; empty when it did not.
        first_piece_chunks: how many of ``chunks`` came with the first one in the same read.
    """

    index: int
    scheduled_s: float
    prompt_tokens: int
    output_tokens: int
    dispatched_s: float = math.nan
    prefill_done_s: float = math.nan
    decode_sent_s: float = math.nan
    first_chunk_s: float = math.nan
    last_chunk_s: float = math.nan
    completion_tokens: int = -1
    chunks: int = 0
    longest_gap_s: float = 0.0
    error: str = ""
    first_piece_chunks: int = 0

    @property
    def failed(self) -> bool:
        """Whether the engine failed it; the user ending the replay early is no failure."""
        return bool(self.error) and self.error != INTERRUPTED_ERROR

    @property
    def ttft_s(self) -> float:
        """From the time it should have left to its first token, s."""
        return self.first_chunk_s - self.scheduled_s

    @property
    def in_one_piece(self) -> bool:
        """Whether something on the way has buffered the stream.

        All tokens came at once, or most of them with the first one: nothing is known about the time
        between them. The piece may be read in several parts, an instant apart.
        """
        made = self.completion_tokens
        if not math.isfinite(self.first_chunk_s) or not (made > 1 or self.uncounted):
            return False
        took_s = self.last_chunk_s - self.first_chunk_s
        at_once_s = PIECE_S * max(1.0, (made - 1) / PIECE_TOKENS)
        return took_s < at_once_s or 2 * self.first_piece_chunks > max(self.chunks, 2)

    @property
    def uncounted(self) -> bool:
        """Whether it was answered, but nobody says with how many tokens."""
        return not self.error and math.isfinite(self.first_chunk_s) and self.completion_tokens < 0

    @property
    def tpot_s(self) -> float:
        """Time per output token by the server's count, s.

        NaN for fewer than two tokens, for a stream that came in one piece, and without a count.
        """
        made = self.completion_tokens
        if made < 2 or self.in_one_piece:
            return math.nan
        return (self.last_chunk_s - self.first_chunk_s) / (made - 1)
