#!/bin/sh
# Makes the bucket with the administrator's credentials, and in MinIO the service's user.
set -eu
MEDDIFF_S3_ACCESS_KEY=$(cat /run/secrets/store_admin_access_key)
MEDDIFF_S3_SECRET_KEY=$(cat /run/secrets/store_admin_secret_key)
export MEDDIFF_S3_ACCESS_KEY MEDDIFF_S3_SECRET_KEY
set --
for other in ${READABLE_BUCKETS:-}; do set -- "$@" --read "$other"; done
case "$STORE" in
  *minio*) set -- "$@" --access-key /run/secrets/meddiff_s3_access_key --secret-key /run/secrets/meddiff_s3_secret_key ;;
esac
exec meddiff admin bucket "$@"
