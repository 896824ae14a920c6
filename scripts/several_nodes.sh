#!/usr/bin/env bash
# Trains on several machines: the same command on each, in any order.
#   NODES=4 HOST=node0 bash scripts/several_nodes.sh --preset r50_300ep --data.train train.beton --out runs/r50
# HOST is one of them, reachable by all on PORT. Only its rank 0 reads and writes --out, so the folder need not be shared; the data must be on all.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${NODES:?how many machines}" "${HOST:?one of them}"
PORT=${PORT:-29400} JOB=${JOB:-fastbyol} GPUS=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
[ "$GPUS" -gt 0 ] || GPUS=1

# An older torchrun does not know the option, and kills 30 s after a signal.
WAIT=() GRACE_S=20
if torchrun --help | grep -q -e --shutdown-timeout; then WAIT=(--shutdown-timeout 120) GRACE_S=110; fi
[[ " $* " == *" --grace_s"[\ =]* ]] || set -- --grace_s "$GRACE_S" "$@" # as long as torchrun waits; typed, it is yours: of two the last would count, with a warning
# c10d: no server of its own; a machine that comes back joins again, and all continue from the last checkpoint.
exec torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" --rdzv-backend c10d --rdzv-endpoint "$HOST:$PORT" --rdzv-id "$JOB" \
  --max-restarts 10 --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "${WAIT[@]}" \
  fastbyol/train.py "$@"
