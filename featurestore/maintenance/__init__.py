"""What is done with a whole store: verify, describe, list, merge, export, collect garbage."""
