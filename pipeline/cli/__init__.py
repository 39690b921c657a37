"""`distily-cache`: parse, call one function, map errors to exit codes."""

from __future__ import annotations

import sys

import typer

from distily.system.command_line import add_version, installed, quiet_libraries, reflow_help
from distily.system.stopping import stoppable
from pipeline.cli.exchange import export, import_command, merge
from pipeline.cli.generating import generate, plan
from pipeline.cli.reporting import report
from pipeline.cli.sharing import pull, push
from pipeline.cli.spelling import spelled
from pipeline.cli.stores import gc, info, list_command, verify

app = typer.Typer(
    name="distily-cache",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Run a teacher once over a data set and keep what a student learns from: "
    "per token the top of its distribution and chosen hidden states, in a feature store.",
)
add_version(app, "distily-cache")
# In the order of `--help`.
for _name, _command in (
    ("generate", generate),
    ("plan", plan),
    ("info", info),
    ("verify", verify),
    ("ls", list_command),
    ("report", report),
    ("gc", gc),
    ("merge", merge),
    ("export", export),
    ("import", import_command),
    ("push", push),
    ("pull", pull),
):
    app.command(_name)(_command)
reflow_help(app)


def main() -> None:
    quiet_libraries()
    with stoppable("distily-cache"), installed("distily-cache", "[generate] or [generate-cpu]"):
        app(spelled(sys.argv[1:], typer.main.get_command(app)))
