"""Capture: from a teacher's logits and hidden states to small per-position features, inside the engine."""
