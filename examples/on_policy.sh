#!/usr/bin/env bash
# On-policy distillation: a student learns from a cache; then, round by round, it writes texts of its own, the
# teacher scores them into the same cache, and it learns on from all that is there by then.
#
#   examples/on_policy.sh TEACHER DATASET RUN
#
# With the demo: python -m pipeline.demo run && examples/on_policy.sh run/teacher run/topics.jsonl run/on_policy
# Killed, it goes on with what is missing; a round that has ended is not trained again.
set -euo pipefail
TEACHER=$1 DATASET=$2 RUN=$3
VENV=${VENV:-.venv}
ENGINE=${ENGINE:-vllm}
ROUNDS=${ROUNDS:-2}
SAMPLES=${SAMPLES:-32}
STEPS=${STEPS:-8}
LAYERS=${LAYERS:-6}

score() {
  "$VENV/bin/distily-cache" generate "$TEACHER" "$DATASET" --out "$RUN/cache" --engine "$ENGINE" \
    --num-samples "$SAMPLES" --max-seq-len 256 "$@"
}
learn() {
  [ -f "$RUN/round-$1/summary.json" ] || "$VENV/bin/distily-train" from-cache "$RUN/cache" \
    --output-dir "$RUN/round-$1" --max-steps "$STEPS" --learning-rate 1e-3 --per-device-train-batch-size 4 \
    --save-strategy no --overwrite-output-dir "${@:2}"
}

printf '\n==> round 0: the data set itself\n'
score
learn 0 --student-model-config "{\"num_hidden_layers\": $LAYERS}" --student-model-as-bitnet
for round in $(seq 1 "$ROUNDS"); do
  student="$RUN/round-$((round - 1))"
  printf '\n==> round %s: texts of %s, scored by the teacher\n' "$round" "$student"
  score --from-student "$student" --continuations 2 --prompt-tokens 32 --continuation-max-tokens 64
  learn "$round" --student "$student"
done
