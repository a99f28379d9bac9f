# A worker of any of the four services, which the command names: trainer, mask_sampler, inpainter or quality_scorer.
#   docker build -f deploy/worker.Dockerfile -t meddiff/worker .
#   docker build -f deploy/worker.Dockerfile -t meddiff/worker:cuda --build-arg ACCELERATOR=cu130 .
# The CUDA build of torch brings its own CUDA libraries: the host gives the driver alone.
FROM docker.io/library/python:3.11-slim-bookworm AS build
ARG ACCELERATOR=cpu
RUN python -m venv /opt/meddiff \
 && /opt/meddiff/bin/pip install --no-cache-dir --quiet --no-deps \
      --extra-index-url "https://download.pytorch.org/whl/${ACCELERATOR}" "torch==2.13.0+${ACCELERATOR}"
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY shared ./shared
COPY services ./services
RUN /opt/meddiff/bin/pip install --no-cache-dir --quiet --constraint constraints.txt ".[worker]" \
 && /opt/meddiff/bin/pip uninstall --quiet --yes pip

FROM docker.io/library/python:3.11-slim-bookworm
ARG VERSION=0.1.0
ARG ACCELERATOR=cpu
LABEL org.opencontainers.image.title="meddiff worker" \
      org.opencontainers.image.description="Training, mask sampling, inpainting and quality scoring of MedDiff-FT" \
      org.opencontainers.image.version="${VERSION}+${ACCELERATOR}" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/meddiff /opt/meddiff
RUN install -d -o 10001 -g 10001 /scratch
ENV PATH=/opt/meddiff/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    MEDDIFF_HOST=0.0.0.0 MEDDIFF_METRICS_PORT=9100 MEDDIFF_SCRATCH=/scratch \
    HF_HOME=/scratch/hub HF_HUB_OFFLINE=1 MPLCONFIGDIR=/tmp/matplotlib TMPDIR=/scratch THP_MEM_ALLOC_ENABLE=1
USER 10001:10001
VOLUME /scratch
EXPOSE 9100
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9100/metrics', timeout=8)"]
ENTRYPOINT ["python", "-m"]
CMD ["meddiff_services.trainer"]
