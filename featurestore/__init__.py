"""The feature store: a content-addressed, crash-safe cache of what a teacher computed per token.

Needs numpy, pyarrow and zarr only, and obstore for object storage; torch, vLLM and transformers are never
imported here.
"""
