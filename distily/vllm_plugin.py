"""vLLM's entry point (group `vllm.general_plugins`), which every vLLM process of the environment loads.

It does nothing, and imports nothing of ours, in a process that is not one of a capture: only the command that
starts an engine sets the variable, and the engine's processes inherit it.
"""

from __future__ import annotations

import os

# Process id of the command that captures.
DRIVER_VARIABLE = "DISTILY_DRIVER_PID"


def register() -> None:
    """Put the capturing twin in the place of the teacher's class, if this process belongs to a capture.

    Raises:
        ImportError: a file of the user's hides one of our packages; the message names it.
    """
    if DRIVER_VARIABLE not in os.environ:
        return
    from distily import import_own

    import_own("pipeline.capture.plugin").register()
