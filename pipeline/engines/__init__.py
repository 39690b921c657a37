"""Teacher engines: vLLM (fast) and plain transformers (the oracle, and the fallback)."""
