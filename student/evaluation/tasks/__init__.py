"""Task files for lm-evaluation-harness, of what it lacks, and the functions that they name."""
