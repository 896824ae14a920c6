# Two targets on Debian 12 and its own Python 3.11:
#   docker build --target cpu  -t fastbyol:cpu .          torch, ffcv, evaluation, export
#   docker build --target cuda -t fastbyol:cuda .         the same, and DALI (the default)
#   docker run --gpus all --ipc=host -v /data:/data -v /runs:/runs fastbyol:cuda \
#     torchrun --nproc-per-node 8 -m fastbyol train --preset r50_300ep --data.train /data/train.beton --out /runs/r50
# PyPI's torch for Linux holds CUDA's libraries, so the cuda target needs nothing else from NVIDIA but the driver and the container toolkit of the host; for a
# smaller cpu target give the address of an index with torch's CPU builds: --build-arg PIP_EXTRA_INDEX_URL=...
# Built by us: both targets, by scripts/container_without_docker.sh (buildah with chroot isolation on a base by debootstrap, no Docker engine), and run without a GPU as
# user 1000: doctor, convert, three steps of train, evaluate all, export to ONNX. More: scripts/README.md.
ARG BASE=debian:12-slim

FROM ${BASE} AS system
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# libGL and GLib: for PyPI's opencv-python, which `import ffcv` imports; training loads ffcv's C library only, which needs neither.
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install -y --no-install-recommends \
      python3 python3-dev python3-venv g++ libturbojpeg0 libopencv-core406 libopencv-imgproc406 libgl1 libglib2.0-0 && \
    rm -rf /var/lib/apt/lists/*
# torch.compile needs the compiler and Python's headers at run time; kernels compile once, into a place that stays writable in a read-only container.
ENV PATH=/opt/fastbyol/bin:$PATH NUMBA_CACHE_DIR=/tmp/numba PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

FROM system AS build
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install -y --no-install-recommends pkg-config libturbojpeg0-dev libopencv-core-dev libopencv-imgproc-dev && \
    rm -rf /var/lib/apt/lists/*
ARG PIP_EXTRA_INDEX_URL=""
WORKDIR /build
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY scripts/ffcv_build scripts/ffcv_build
RUN python3 -m venv /opt/fastbyol && pip install --constraint constraints.txt torch torchvision numpy
# FFCV comes as source, and is built here so that the final image needs no headers of TurboJPEG and OpenCV.
RUN PKG_CONFIG_PATH=/build/scripts/ffcv_build/pc pip install --constraint constraints.txt ffcv==1.0.2
COPY fastbyol fastbyol
RUN pip install --constraint constraints.txt '.[timm,eval,export,tensorboard,parquet]'

FROM system AS cpu
COPY --from=build /opt/fastbyol /opt/fastbyol
RUN useradd --create-home --uid 1000 fastbyol
USER 1000
WORKDIR /home/fastbyol
HEALTHCHECK --interval=5m --timeout=60s CMD ["fastbyol", "doctor", "--quick"]
CMD ["fastbyol", "--help"]

FROM build AS build_cuda
RUN pip install --constraint constraints.txt '.[dali]'

FROM system AS cuda
COPY --from=build_cuda /opt/fastbyol /opt/fastbyol
RUN useradd --create-home --uid 1000 fastbyol
USER 1000
WORKDIR /home/fastbyol
HEALTHCHECK --interval=5m --timeout=60s CMD ["fastbyol", "doctor", "--quick"]
CMD ["fastbyol", "--help"]
