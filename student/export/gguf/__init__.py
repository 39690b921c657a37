"""Students as GGUF files, for llama.cpp and what reads its format."""
