"""A second GPU and a second LLM, for tests that everything physical follows the description."""

from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "data"
TOY_GPU = str(DATA / "toy-40gb.yaml")
TOY_LLM = str(DATA / "toy-9b.yaml")
