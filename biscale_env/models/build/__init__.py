"""Models of any LLM on any GPU: from a Hugging Face `config.json` to a folder of coefficients."""
