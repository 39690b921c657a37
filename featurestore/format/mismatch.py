"""Why a store cannot take the numbers of another teacher, and which flag decides that, in one line."""

from __future__ import annotations

from pathlib import Path

from featurestore.format.schema import TeacherIdentity

_OTHER_OUT = "give another --out"


def explain(place: str | Path, there: TeacherIdentity, now: TeacherIdentity) -> str:
    """The line for identities that differ: what differs, the flags that decide it, and what to do."""
    differences = there.differences(now)
    listed = "; ".join(f"{name} is {a!r} there, {b!r} now" for name, a, b in differences)
    flags = list(dict.fromkeys(_flag(name, there) for name, _, _ in differences))
    return (
        f"the store {place} belongs to another teacher or engine: {listed}; to extend it give "
        f"{' and '.join(flags)}, else {_OTHER_OUT}"
    )


def _flag(name: str, there: TeacherIdentity) -> str:
    """The flag, with its value, that makes a field what it is in the store."""
    if name == "dtype":
        return f"--dtype {there.dtype}"
    if name == "engine":
        kind, _, layout = there.engine.partition(":")
        return f"--layout {layout} of `import`" if kind == "import" else f"--engine {there.engine}"
    if name == "quantization":
        if there.quantization == "none":
            return "neither --teacher-load-in-8bit nor --teacher-load-in-4bit"
        return f"the --teacher-load-in-8bit or -4bit that gives {there.quantization}"
    return f"the same TEACHER ({there.name})"
