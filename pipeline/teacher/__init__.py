"""The teacher's checkpoint: identity, tokenizer, quantization, and the weights kept in a store."""
