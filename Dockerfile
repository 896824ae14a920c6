# fastbyol with both fast backends. Not built by us yet: no Docker engine where this was written.
#   docker build -t fastbyol .
#   docker run --gpus all --ipc=host -v /data:/data fastbyol torchrun --nproc-per-node 8 fastbyol/train.py --preset r50_300ep --data.train /data/train.beton --out /data/runs/r50
FROM python:3.11-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
WORKDIR /fastbyol
COPY pyproject.toml constraints.txt Makefile README.md LICENSE ./
COPY scripts scripts
COPY fastbyol fastbyol
# Debian packages, .venv, torch, DALI, ffcv: the same target as on any machine.
RUN make install && rm -rf /var/lib/apt/lists/* /root/.cache
COPY . .
# The kernel compiles once, into a folder that stays writable in a read-only container.
ENV PATH=/fastbyol/.venv/bin:$PATH NUMBA_CACHE_DIR=/tmp/numba
CMD ["python", "-m", "fastbyol", "--help"]
