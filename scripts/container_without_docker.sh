#!/usr/bin/env bash
# Builds the Dockerfile's cpu target on a Debian machine without a Docker engine or registry, as root: debootstrap makes the base, buildah the image; then
# runs doctor, a conversion and three training steps in it.
#   apt-get install buildah debootstrap && scripts/container_without_docker.sh
#   BUILD_OPTIONS='--volume /etc/pip.conf:/etc/pip.conf:ro' scripts/container_without_docker.sh      # more options of `buildah build` and `run`
#   TESTS='-m "not compile and not distributed"' scripts/container_without_docker.sh                 # then these tests too, in a copy of the last commit
set -euo pipefail
cd "$(dirname "$0")/.."
TARGET=${TARGET:-cpu} IMAGE=${IMAGE:-fastbyol:$TARGET} WORK=${WORK:-$(mktemp -d)}
export BUILDAH_ISOLATION=chroot

if ! buildah inspect --type image localhost/debian:12-slim >/dev/null 2>&1; then
  debootstrap --variant=minbase bookworm "$WORK/debian"
  container=$(buildah from scratch)
  buildah copy -q "$container" "$WORK/debian" /
  buildah commit -q --rm "$container" localhost/debian:12-slim
  rm -rf "$WORK/debian"
fi
# shellcheck disable=SC2086
buildah build --format docker --layers --build-arg BASE=localhost/debian:12-slim --target "$TARGET" --tag "$IMAGE" ${BUILD_OPTIONS:-} .

container=$(buildah from "localhost/$IMAGE")
trap 'buildah rm "$container" >/dev/null' EXIT
inside() { printf '\n$ %s\n' "$*"; buildah run --user fastbyol "$container" -- "$@"; }
inside fastbyol doctor
inside fastbyol demo-data --kind scenes --train-per-class 20 --val-per-class 5 --out demo/images
inside fastbyol convert --data demo/images/train --out demo/train.beton
inside fastbyol convert --data demo/images/val --out demo/val.beton
inside fastbyol train --preset cpu_demo_scenes --steps 3 --optim.warmup_epochs 0 --data.train demo/train.beton --out runs/demo
inside fastbyol evaluate all --checkpoint runs/demo --data demo
inside fastbyol export --checkpoint runs/demo --to onnx --out encoder.onnx

if [[ -n ${TESTS:-} ]]; then
  git archive --format tar --output "$WORK/repository.tar" HEAD
  buildah add -q --chown fastbyol "$container" "$WORK/repository.tar" /home/fastbyol/repository
  # fastbyol is there already, so that this brings only what its tests need besides.
  # shellcheck disable=SC2086
  buildah run --user root ${BUILD_OPTIONS:-} "$container" -- \
    pip install --quiet --constraint /home/fastbyol/repository/constraints.txt 'fastbyol[dev,dali]'
  inside bash -c "cd repository && python -m pytest -n 2 --dist loadfile $TESTS"
fi
