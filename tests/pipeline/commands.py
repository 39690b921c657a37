"""Run `distily-cache` command lines one after another in this process, with the engines of all inside:
`python -m tests.pipeline.commands LINES.json`; the lines are {name: [words, ...]}. Prints one line of JSON,
{name: {"code": exit code, "stderr": text}}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.command import call
from tests.pipeline import inside


def main() -> None:
    inside.prepare()
    found = {}
    for name, words in json.loads(Path(sys.argv[1]).read_text()).items():
        done = call("distily-cache", *words, code=None)
        found[name] = {"code": done.returncode, "stderr": done.stderr}
        inside.clean_up()
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
