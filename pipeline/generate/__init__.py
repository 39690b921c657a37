"""`distily-cache generate`: plan, run the engine, commit, and what it costs."""
