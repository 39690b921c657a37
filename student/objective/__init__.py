"""The objective: what is learned from the cache. See docs/objectives.md."""
