#!/usr/bin/env bash
# From nothing to a trained ternary student and a page about it: `make quickstart` runs this.
# The teacher and the cache are made once; only the training runs anew each time.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
RUN=${RUN:-run}
# So many that a processor without AVX-512, at about 6 s a step, trains in a minute; 48 learn visibly more.
STEPS=${STEPS:-10}
# Of the 266 that the text has: the rest would take a slow processor three minutes more.
SAMPLES=${SAMPLES:-160}
step() { printf '\n==> %s\n' "$*"; }

step "1/3 the demo teacher and its text"
"$VENV/bin/python" -m pipeline.demo "$RUN"

step "2/3 the teacher's features, captured in vLLM"
"$VENV/bin/distily-cache" generate "$RUN/teacher" "$RUN/topics.jsonl" --out "$RUN/cache" \
  --num-samples "$SAMPLES" --max-seq-len 512 --hidden-layers 15 --hidden-dtype int8

step "3/3 a BitNet b1.58 student, trained from the cache alone"
"$VENV/bin/distily-train" from-cache "$RUN/cache" --output-dir "$RUN/student" \
  --student-model-config '{"num_hidden_layers": 6}' --student-model-as-bitnet \
  --logits-loss kl --ce-weight 0.1 --hidden-loss cosine --hidden-weight 1.0 \
  --per-device-train-batch-size 4 --learning-rate 1e-3 --max-steps "$STEPS" \
  --eval-fraction 0.05 --eval-steps 0.5 --save-strategy no --overwrite-output-dir
