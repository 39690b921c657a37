#!/usr/bin/env bash
# From nothing to a ternary student that writes about a text, and a page about it: `make quickstart` runs this.
# Teacher and cache are made once; the student is trained, exported and measured anew each time.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
RUN=${RUN:-run}
# Three topics of the text, some fifty sections of it, of which a tenth is held out; the others are read thirteen
# times, which two cores without AVX-512 do in about five minutes. The student knows nothing else: its page shows
# its perplexity on held-out sections beside that on its own. What it writes holds together for a few words at a
# time. The prompts open sentences as the text does, and were chosen among a dozen; others it continues worse.
STEPS=${STEPS:-640}
step() { printf '\n==> %s\n' "$*"; }

step "1/5 the demo teacher and its text"
"$VENV/bin/python" -m pipeline.demo "$RUN"

step "2/5 the teacher's features, captured in vLLM: its distribution and its final states"
"$VENV/bin/distily-cache" generate "$RUN/teacher" "$RUN/sections.jsonl" --out "$RUN/quickstart-cache" \
  --max-seq-len 128 --final

step "3/5 a BitNet b1.58 student of 4 layers, trained from the cache alone"
"$VENV/bin/distily-train" from-cache "$RUN/quickstart-cache" --output-dir "$RUN/student" --overwrite-output-dir \
  --recipe examples/recipes/ternary.yaml --student-model-config '{"num_hidden_layers": 4}' --freeze-embeddings \
  --ce-weight 1 --per-device-train-batch-size 1 --max-steps "$STEPS" \
  --eval-fraction 0.1 --eval-steps 0.25 --save-strategy no

step "4/5 the student as a GGUF file for llama.cpp"
rm -rf "$RUN/student-gguf"
"$VENV/bin/distily-train" export "$RUN/student" --format gguf --gguf-type Q2_0

step "5/5 teacher and student continue the same prompts; the student knows three topics of a text, and them alone"
"$VENV/bin/distily-train" eval "$RUN/student" --trained-samples --prompts examples/prompts.txt \
  --teacher "$RUN/teacher" --max-new-tokens 40
"$VENV/bin/distily-train" report "$RUN/student"
