#!/usr/bin/env bash
# Trains on all GPUs of this machine. A worker that dies is restarted, with all others, from the last checkpoint; the same command again
# continues a run that was stopped.   bash scripts/one_node.sh --preset r50_300ep --data.train train.beton --out runs/r50
set -euo pipefail
cd "$(dirname "$0")/.."
GPUS=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
[ "$GPUS" -gt 0 ] || GPUS=1

# An older torchrun does not know the option, and kills 30 s after a signal.
WAIT=() GRACE_S=20
if torchrun --help | grep -q -e --shutdown-timeout; then WAIT=(--shutdown-timeout 120) GRACE_S=110; fi
[[ " $* " == *" --grace_s"[\ =]* ]] || set -- --grace_s "$GRACE_S" "$@" # as long as torchrun waits; typed, it is yours: of two the last would count, with a warning
# The signals: Ctrl-C, kill, a closed terminal, and SLURM's warning all reach the workers, which save and leave, before torchrun kills.
exec torchrun --standalone --nproc-per-node "$GPUS" --max-restarts 3 \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "${WAIT[@]}" \
  fastbyol/train.py "$@"
