#!/usr/bin/env bash
# The main job, end to end, on real images. Called by `make demo`; every line is a command that a user can type.
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=${BIN:-.venv/bin} KIND=${KIND:-fashion} DATA=${DATA:-demo/fashion} RUN=${RUN:-runs/demo} PRESET=${PRESET:-cpu_demo}
PATH="$PWD/$BIN:$PATH"

run() { printf '\n$ %s\n' "$*"; "$@"; }

[ -d "$DATA/images" ] || run python data_prep/demo_data.py --kind "$KIND" --out "$DATA/images"
for split in train val; do
  [ -f "$DATA/$split.beton" ] || run python data_prep/to_ffcv.py --data "$DATA/images/$split" --out "$DATA/$split.beton"
done
rm -rf "$RUN"
# One thread computes, the loader has the other core: for so small a network two threads gain a tenth on a quiet machine and lose all on a busy one.
export OMP_NUM_THREADS=1
run torchrun --nproc-per-node 1 fastbyol/train.py --preset "$PRESET" --data.train "$DATA/train.beton" --out "$RUN"
unset OMP_NUM_THREADS
run python -m fastbyol evaluate all --checkpoint "$RUN" --data "$DATA"
run python -m fastbyol report --run "$RUN" --data "$DATA"
