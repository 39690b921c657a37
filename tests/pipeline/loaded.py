"""Loads vLLM as a command does, in the process that `tests.command.fork` forks commands from."""

from pipeline.engines.llm import set_environment

set_environment(verbose=False)

import vllm.entrypoints.llm  # noqa: E402, F401
