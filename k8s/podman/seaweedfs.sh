#!/bin/sh
# SeaweedFS as S3 on port 9000: an administrator, and the service's user, who may use its own bucket and read those of
# READABLE_BUCKETS.
set -eu
secret() { cat "/run/secrets/$1"; }
rights='"Read:meddiff", "List:meddiff", "Tagging:meddiff", "Write:meddiff"'
for other in ${READABLE_BUCKETS:-}; do rights="$rights, \"Read:$other\", \"List:$other\""; done
umask 077
cat > /tmp/s3.json <<S3
{"identities": [
  {"name": "admin", "actions": ["Admin", "Read", "List", "Tagging", "Write"],
   "credentials": [{"accessKey": "$(secret store_admin_access_key)", "secretKey": "$(secret store_admin_secret_key)"}]},
  {"name": "meddiff", "actions": [$rights],
   "credentials": [{"accessKey": "$(secret meddiff_s3_access_key)", "secretKey": "$(secret meddiff_s3_secret_key)"}]}
]}
S3
exec weed -logtostderr=true server -dir=/data -ip=127.0.0.1 -ip.bind=127.0.0.1 -master.volumeSizeLimitMB=1024 -volume.max=0 \
  -master.telemetry=false -filer -s3 -s3.ip.bind=0.0.0.0 -s3.port=9000 -s3.config=/tmp/s3.json
