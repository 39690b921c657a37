"""Extensions of other packages: losses, engines and architectures, without a change to ours.

A package names a function under the entry point group `distily.plugins`; it is called once in each process,
before a name is looked up, and registers what it has:

    [project.entry-points."distily.plugins"]
    mine = "my_package:register"
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from distily.errors import PluginError
from distily.text import one_line

GROUP = "distily.plugins"


@cache
def load_plugins() -> None:
    """Call each plugin of the environment, once.

    Raises:
        PluginError: one cannot be imported, or fails.
    """
    for point in entry_points(group=GROUP):
        try:
            point.load()()
        except Exception as error:  # whatever another package raises
            package = point.dist.name if point.dist else "a package"
            raise PluginError(
                f"the plugin {point.name} of {package} failed ({type(error).__name__}: {one_line(error)}); "
                "update or uninstall it"
            ) from error
