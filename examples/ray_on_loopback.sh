#!/usr/bin/env bash
# Two Ray nodes on this machine, and one capture on both: what docs/clusters.md does on four machines.
# Usage: examples/ray_on_loopback.sh TEACHER DATASET STORE [flags of generate]
set -euo pipefail
teacher=$1 dataset=$2 store=$3
shift 3

# `ray start` makes a token of the cluster, and asks whoever joins for it.
export RAY_AUTH_MODE=token
trap 'ray stop >/dev/null' EXIT
ray start --head --port 6380 --num-cpus 1 --include-dashboard false >/dev/null
ray start --address 127.0.0.1:6380 --num-cpus 1 >/dev/null
distily-cache generate "$teacher" "$dataset" --out "$store" --ray 127.0.0.1:6380 --workers 2 "$@"
