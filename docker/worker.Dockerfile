# A worker. By default for NVIDIA GPUs; for the CPU:
#
#   docker build -f docker/worker.Dockerfile -t dram-worker .
#   docker build -f docker/worker.Dockerfile -t dram-worker-cpu \
#       --build-arg BASE=python:3.11-slim-bookworm .
#
# PyTorch's own packages bring the CUDA libraries; the base brings what the NVIDIA container runtime looks for.
# A CPU image becomes gigabytes smaller where pip finds PyTorch's CPU build of the same version: name its index
# with --build-arg PIP_ARGUMENTS="--extra-index-url ...".
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04

# hadolint ignore=DL3006
FROM ${BASE}
ARG PIP_ARGUMENTS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 DRAM_HOME=/data DRAM_LOG_JSON=true
WORKDIR /srv/dram
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN if ! command -v python3; then \
        apt-get update && apt-get install --yes --no-install-recommends python3 python3-venv \
        && rm -rf /var/lib/apt/lists/*; \
    fi \
    && python3 -m venv /opt/venv \
    && groupadd --gid 10001 dram \
    && useradd --uid 10001 --gid dram --no-create-home --home-dir /data dram \
    && install --directory --owner dram --group dram /data
COPY pyproject.toml constraints.txt ./
# Empty packages first: the dependencies' layer is made again only when these two files change.
# shellcheck disable=SC2086
RUN mkdir app workers models migrations \
    && pip install ${PIP_ARGUMENTS} --constraint constraints.txt --editable '.[worker,embedded,s3]'
COPY app app
COPY workers workers
COPY models models
COPY migrations migrations
USER 10001:10001
VOLUME /data
# Warm stop: the running shard is given back, and another worker goes on from its last checkpoint.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=60s --timeout=30s --start-period=60s --retries=3 \
    CMD celery -A workers.celery_app inspect ping --timeout 20 --destination "celery@$(hostname)"
CMD ["celery", "-A", "workers.celery_app", "worker", "-P", "prefork", "-c", "1", "-Q", "gpu", \
     "--without-gossip", "--without-mingle", "--loglevel", "INFO"]
