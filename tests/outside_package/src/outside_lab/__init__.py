"""What a package adds to biscale-env from outside: paths of its files."""

from pathlib import Path

GPU = Path(__file__).parent / "gpu.yaml"
LLM = Path(__file__).parent / "llm.yaml"
SLO = Path(__file__).parent / "slo.yaml"
