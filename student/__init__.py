"""Stage 2 of distily-cache: train a student from a cache of teacher features, without the teacher.

`student` reads stores through `featurestore` only; it never imports `pipeline` or vLLM, and no teacher model
is ever built in the training process.
"""
