#!/usr/bin/env bash
# Trains on all GPUs of this machine. A worker that dies is restarted, with all others, from the last checkpoint; the same command again
# continues a run that was stopped.   bash scripts/one_node.sh --preset r50_300ep --data.train train.beton --out runs/r50
set -euo pipefail
cd "$(dirname "$0")/.."
GPUS=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
[ "$GPUS" -gt 0 ] || GPUS=1

[[ " $* " == *" --grace_s"[\ =]* ]] || set -- --grace_s 110 "$@" # as long as torchrun waits; typed, it is yours: no option may come twice
# The signals: Ctrl-C, kill, a closed terminal, and SLURM's warning all reach the workers, which save and leave. After 120 s torchrun kills.
exec torchrun --standalone --nproc-per-node "$GPUS" --max-restarts 3 \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 120 \
  fastbyol/train.py "$@"
