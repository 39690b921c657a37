"""`distily-train from-cache`: plan, build, train with transformers' Trainer, resume, summarise."""
