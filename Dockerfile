# Two images from one file: `docker build .` or `--target cpu`, and `--target cuda`. How to run them is in docs/operations.md.
# TORCH is the version that goes in. TORCH_INDEX_URL, empty by default, is one more package index to take it from: the one of torch's
# CPU builds makes the cpu image several times smaller.
ARG TORCH=2.13.0
ARG TORCH_INDEX_URL=""

# Has the C++ compiler that the CPU kernels need; only the wheel leaves it.
FROM python:3.12.12-trixie AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /source
COPY . .
# The kernels are an optional part of the package, so a failed compilation would pass unnoticed: look for them in the wheel.
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel . \
    && python -m zipfile --list /wheel/*.whl | grep 'kernels/cpu/.*[.]so'

FROM python:3.12.12-slim-trixie AS runtime
ENV PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    BRAID_CACHE=/var/lib/braid \
    BRAID_DATA_DIR=/var/lib/braid/data \
    HF_HOME=/var/lib/braid/huggingface \
    TRITON_CACHE_DIR=/var/lib/braid/triton
# The volume takes over owner and mode of this folder when it is created.
RUN groupadd --gid 10001 braid \
    && useradd --uid 10001 --gid braid --home-dir /var/lib/braid --no-create-home --shell /usr/sbin/nologin braid \
    && install --directory --owner=braid --group=braid --mode=0750 /var/lib/braid
COPY docker/healthcheck.py /opt/braid/healthcheck.py
VOLUME ["/var/lib/braid"]
EXPOSE 8000
STOPSIGNAL SIGTERM
# The first start fetches the model, which counts as starting and not as ill.
HEALTHCHECK --start-period=10m --interval=10s --timeout=5s --retries=3 CMD ["python", "/opt/braid/healthcheck.py"]
ENTRYPOINT ["braid", "serve", "--host", "0.0.0.0"]

FROM runtime AS cuda
ARG TORCH
ARG TORCH_INDEX_URL
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Triton compiles a small C launcher for each kernel when it is first used. The version is that of the base image's Debian release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
# hadolint ignore=DL3013
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,from=build,source=/wheel,target=/wheel \
    pip install ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} "torch==$TORCH" "$(echo /wheel/*.whl)[cuda]"
USER 10001:10001

FROM runtime AS cpu
ARG TORCH
ARG TORCH_INDEX_URL
# torch has a version and the wheel is ours: nothing here is left to pin.
# hadolint ignore=DL3013
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,from=build,source=/wheel,target=/wheel \
    pip install ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} "torch==$TORCH" /wheel/*.whl
USER 10001:10001
