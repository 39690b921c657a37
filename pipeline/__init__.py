"""Stage 1: a data set runs through the teacher once and its features go into a feature store."""
