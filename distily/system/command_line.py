"""What both command lines have in common: `--version`, help set as prose, quiet libraries."""

# Without postponed annotations: typer reads them, and one of them holds a local function.
import inspect
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from distily import __version__


def add_version(app: typer.Typer, program: str) -> None:
    """Give `program` the option `--version`, which prints `PROGRAM VERSION` and ends."""

    def show(asked: bool) -> None:
        if asked:
            typer.echo(f"{program} {__version__}")
            raise typer.Exit

    @app.callback()
    def options(
        version: Annotated[
            bool, typer.Option("--version", callback=show, is_eager=True, help="Show the version and exit.")
        ] = False,
    ) -> None:
        pass


def reflow_help(app: typer.Typer) -> None:
    """Let the help of each command fill the terminal's lines; typer keeps the line breaks of docstrings."""
    for command in app.registered_commands:
        text = inspect.cleandoc(command.help or (command.callback and command.callback.__doc__) or "")
        command.help = re.sub(r"(?<!\n)\n(?!\n)", " ", text)


# What brings a package, where it is not the extra of the command's own stage.
_EXTRAS = {
    "bitsandbytes": "[quantized]",
    "compressed_tensors": "[export]",
    "gguf": "[export]",
    "lm_eval": "[eval]",
    "obstore": "[s3]",
    "optuna": "[sweep]",
    "peft": "[peft]",
    "ray": "[ray]",
}
_OF_A_STAGE = {
    *("accelerate", "datasets", "huggingface_hub", "matplotlib", "safetensors", "torch", "transformers"),
    *("vllm", "yaml"),
}


@contextmanager
def installed(program: str, extra: str) -> Iterator[None]:
    """End `program` with one line and exit code 2 where a package is not installed that an extra brings.

    extra: of the program's own stage.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS and package not in _OF_A_STAGE:
            raise
        wanted = _EXTRAS.get(package, extra)
        sys.stderr.write(f"{program}: this needs the package {package}; install the extra {wanted}\n")
        sys.exit(2)


def quiet_libraries(quiet: bool = False) -> None:
    """No progress bars of Hugging Face's libraries where stderr is no terminal, or `quiet` is asked for; and
    not the hint of bitsandbytes, which peft imports for every training, that a kernel for its 4-bit products
    on CPUs that multiply bfloat16 could be installed.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if not quiet and sys.stderr.isatty():
        return
    # Read when they are imported, and inherited by processes that are started.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if transformers := sys.modules.get("transformers"):
        transformers.utils.logging.disable_progress_bar()
