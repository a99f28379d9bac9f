#!/bin/bash
# Plays the manifests of k8s/podman, which are those of k8s/base but for what podman does not know, with podman on this
# machine; runs a fine-tune and a generate job on them and takes them away again. Images: those deploy/smoke.sh built.
#   deploy/kube-play.sh        needs podman, and kubectl for kustomize
set -euo pipefail
cd "$(dirname "$0")/.."
tag=${MEDDIFF_TAG:-smoke}
python=${PYTHON:-.venv/bin/python}
scratch=$(mktemp -d)
deploy/secrets.sh
mkdir "$scratch/secrets"
cp deploy/secrets/* "$scratch/secrets/"
printf 'redis://:%s@redis-pod-0:6379/0' "$(cat deploy/secrets/redis_password)" > "$scratch/secrets/meddiff_redis_url"
chmod -R a+rX "$scratch"
kubectl kustomize k8s/podman | sed "s#image: meddiff/\(gateway\|worker\)\$#image: localhost/meddiff/\1:$tag#; s#/SECRETS#$scratch/secrets#" > "$scratch/all.yaml"
leave() {
  [ $? = 0 ] || podman ps -a --format '{{.Names}} {{.Status}}'
  podman kube down "$scratch/all.yaml" > /dev/null 2>&1 || podman play kube --down "$scratch/all.yaml" > /dev/null 2>&1 || true
  podman volume rm redis store > /dev/null 2>&1 || true
  podman network rm meddiff-play > /dev/null 2>&1 || true
  rm -rf "$scratch"
}
trap leave EXIT
podman network exists meddiff-play || podman network create meddiff-play > /dev/null
podman kube play --network meddiff-play "$scratch/all.yaml" > "$scratch/played" 2>&1 || { cat "$scratch/played"; exit 1; }
ready() { "$python" - <<'P'
import sys, time, httpx
deadline = time.monotonic() + 300
while time.monotonic() < deadline:
    try:
        lines = httpx.get("http://127.0.0.1:8080/metrics").text.splitlines()
        live = [line for line in lines if line.startswith("meddiff_workers{") and float(line.rpartition(" ")[2]) > 0]
        if len(live) == 5 and httpx.get("http://127.0.0.1:8080/readyz").is_success:
            sys.exit(0)
    except httpx.TransportError:
        pass
    time.sleep(1)
sys.exit("not ready within 300 s")
P
}
ready
key=$(podman exec gateway-pod-0-gateway meddiff admin keys create --tenant smoke --role admin | tail -1 | tr -d '\r\n')
"$python" deploy/smoke.py work --state "$scratch/state.json" --address http://127.0.0.1:8080 --key "$key"
podman ps --format '{{.Names}} {{.Status}}'
