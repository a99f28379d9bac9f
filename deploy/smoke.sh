#!/bin/bash
# Builds every image, brings the compose stack up beside any that runs, and shows that it works: a fine-tune and a
# generate job through the published port with an API key; every alert's metric in Prometheus; no container with more
# rights than it needs; everything still there after down and up; and the same manifest where every service is
# restarted during the job. Takes down what it brought up, volumes included.
#   deploy/smoke.sh                             with Docker, MinIO
#   ENGINE=podman COMPOSE=podman-compose STORE=seaweedfs deploy/smoke.sh
set -euo pipefail
cd "$(dirname "$0")/.."
export ENGINE=${ENGINE:-docker} COMPOSE_PROJECT_NAME=meddiff-smoke BUILDAH_FORMAT=docker
export COMPOSE_PROFILES=${STORE:-minio} MEDDIFF_PUBLISH=127.0.0.1:18080 PROMETHEUS_PUBLISH=127.0.0.1:19090
export MEDDIFF_TAG=smoke
compose=${COMPOSE:-docker compose}
python=${PYTHON:-.venv/bin/python}
scratch=$(mktemp -d)
begun=$SECONDS
step() { echo "== $((SECONDS - begun)) s: $*"; }
ask() {
  "$python" deploy/smoke.py "$1" --state "$scratch/state.json" --address http://127.0.0.1:18080 \
    --prometheus http://127.0.0.1:19090 --key "${key:-}"
}
leave() {
  [ $? = 0 ] || $compose logs --tail 20 > "$scratch/logs" 2>&1 && tail -60 "$scratch/logs" 2>/dev/null || true
  $compose down --volumes > /dev/null 2>&1 || true
  rm -rf "$scratch"
}
trap leave EXIT

deploy/secrets.sh
step "building"
$compose build > "$scratch/build" 2>&1 || { tail -30 "$scratch/build"; exit 1; }
for image in gateway worker; do
  "$ENGINE" image inspect --format "meddiff/$image:$MEDDIFF_TAG {{.Size}} bytes, user {{.Config.User}}" "meddiff/$image:$MEDDIFF_TAG"
done
"$ENGINE" image inspect --format 'base {{.Size}} bytes' docker.io/library/python:3.11-slim-bookworm || true  # BuildKit keeps it to itself.

step "up"
$compose up -d > "$scratch/up" 2>&1 || { tail -30 "$scratch/up"; exit 1; }
ask ready
key=$($compose exec -T gateway meddiff admin keys create --tenant smoke --role admin | tail -1 | tr -d '\r\n')
step "ready; a fine-tune and a generate job"
ask work
step "metrics"
ask watched
step "rights"
deploy/hardened.sh "$COMPOSE_PROJECT_NAME"

step "down and up again"
$compose down > /dev/null 2>&1
$compose up -d > /dev/null 2>&1
ask check

step "every service restarted during a generate job"
ask rolling &
running=$!
for service in gateway mask-sampler inpainter quality-scorer trainer redis "$COMPOSE_PROFILES" prometheus; do
  sleep 2
  kill -0 "$running" 2>/dev/null || { echo "the job ended before $service was restarted"; exit 1; }
  $compose restart "$service" > /dev/null 2>&1
  step "restarted $service"
done
wait "$running"
step "done"
