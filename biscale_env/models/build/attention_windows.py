"""Which attention layers of a Hugging Face configuration see a sliding window alone."""

from collections.abc import Mapping
from typing import Any, Final

SLIDING: Final = "sliding_attention"
GEMMA3_PATTERN: Final = 6  # every sixth layer of Gemma 3 sees everything


def window_layers(data: Mapping[str, Any], architecture: str, layers: int) -> tuple[int, int]:
    """Window in tokens, and how many layers it bounds; (0, 0) without one.

    Newer configurations list the kind of every layer (``layer_types``); of older ones the
    architecture tells: Gemma 2 alternates, Gemma 3 has a pattern, Qwen windows the layers from
    ``max_window_layers`` on if told to, Mistral and Phi 3 all.
    """
    window = data.get("sliding_window")
    if not isinstance(window, int) or window <= 0:
        return 0, 0
    kinds = data.get("layer_types")
    if isinstance(kinds, list):
        count = sum(kind == SLIDING for kind in kinds)
    elif architecture.startswith("Qwen"):
        first = int(data.get("max_window_layers", layers))
        count = max(layers - first, 0) if data.get("use_sliding_window") else 0
    elif architecture.startswith("Gemma3"):
        pattern = int(data.get("sliding_window_pattern", GEMMA3_PATTERN))
        count = layers - layers // pattern
    elif architecture.startswith(("Gemma2", "GptOss")):
        count = (layers + 1) // 2
    elif architecture.startswith(("Mistral", "Mixtral", "Phi3")):
        count = layers
    else:
        count = 0
    return (window, count) if count else (0, 0)
