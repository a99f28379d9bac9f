# The gateway: no torch, no compiler, no weights.
#   docker build -f deploy/gateway.Dockerfile -t meddiff/gateway .
FROM docker.io/library/python:3.11-slim-bookworm AS build
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY shared ./shared
COPY services ./services
RUN python -m venv /opt/meddiff \
 && /opt/meddiff/bin/pip install --no-cache-dir --quiet --constraint constraints.txt ".[gateway]" \
 && rm -rf /opt/meddiff/lib/python3.11/site-packages/meddiff/foundations \
 && /opt/meddiff/bin/pip uninstall --quiet --yes pip setuptools

FROM docker.io/library/python:3.11-slim-bookworm
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="meddiff gateway" \
      org.opencontainers.image.description="HTTP API of MedDiff-FT as a service" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/meddiff /opt/meddiff
ENV PATH=/opt/meddiff/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    MEDDIFF_HOST=0.0.0.0 MEDDIFF_PORT=8080
USER 10001:10001
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/healthz', timeout=4)"]
ENTRYPOINT ["python", "-m", "meddiff_services.gateway"]
