#!/usr/bin/env bash
# Make the virtual environment that the Makefile uses.
# Packages have the versions of requirements/cpu.lock or requirements/cuda.lock.
# ACCELERATOR=auto|cpu|cuda   auto takes cuda where nvidia-smi lists a GPU.
# TORCH_CPU_INDEX=URL          where the CPU build of torch comes from when no local wheel directory has it
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}
ACCELERATOR=${ACCELERATOR:-auto}
TORCH_CPU_INDEX=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "setup: $PYTHON is $("$PYTHON" --version 2>&1); Python 3.11 or newer is needed, set PYTHON=python3.11" >&2
  exit 2
fi
if [ "$ACCELERATOR" = auto ]; then
  if nvidia-smi -L 2>/dev/null | grep -q GPU; then ACCELERATOR=cuda; else ACCELERATOR=cpu; fi
fi
case "$ACCELERATOR" in
cpu | cuda) ;;
*)
  echo "setup: ACCELERATOR=$ACCELERATOR; choose auto, cpu or cuda" >&2
  exit 2
  ;;
esac
# The wheels of torch and vLLM are built for CUDA 13; behind an older driver they see no GPU.
if [ "$ACCELERATOR" = cuda ]; then
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 || true)
  if [[ "$driver" =~ ^([0-9]+)\. ]] && [ "${BASH_REMATCH[1]}" -lt 580 ]; then
    echo "setup: the NVIDIA driver is $driver, and the CUDA 13 builds of torch and vLLM need 580 or newer; update it," \
      "install their CUDA 12 builds by hand, or use the CPU with ACCELERATOR=cpu" >&2
    exit 2
  fi
fi
echo "setup: $VENV, $ACCELERATOR build"
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

index=()
if [ "$ACCELERATOR" = cpu ]; then
  torch=$(grep '^torch==' requirements/cpu.lock)
  # A CPU wheel in a local wheel directory (pip's find-links setting) makes PyTorch's index unnecessary.
  if ! pip install -q --dry-run --no-deps --no-index "$torch" >/dev/null 2>&1; then
    index=(--extra-index-url "$TORCH_CPU_INDEX")
  fi
fi
# pip unpacks one package after another, and would compile 33,000 files of which 7,000 are ever imported:
# several of it share the list, the large packages at its end first, and Python compiles what it imports.
grep '^[A-Za-z]' "requirements/$ACCELERATOR.lock" | sort -r | xargs -n 40 -P "$(nproc)" \
  "$VENV/bin/python" -m pip --disable-pip-version-check install -q --no-deps --no-compile "${index[@]}"
# Beside the last step, and once for all processes of a test run, which would each do it at the same time.
"$VENV/bin/python" -W ignore -c 'import transformers.trainer, vllm.entrypoints.llm, vllm.v1.worker.worker_base' \
  >/dev/null 2>&1 &
pip install -q --no-deps --no-build-isolation -e .
wait
# A CPU build of the same version satisfies pip, if it is there or in a local wheel directory.
torch=$("$VENV/bin/python" -c 'from importlib.metadata import version; print(version("torch"))')
if [ "$ACCELERATOR" = cuda ] && [[ "$torch" == *+cpu ]]; then
  echo "setup: $VENV holds torch $torch, which uses no GPU; remove $VENV, keep that wheel out of pip's find-links," \
    "and run this again" >&2
  exit 1
fi
touch "$VENV/.ready"
