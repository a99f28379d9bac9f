#!/bin/sh
# meddiff admin mirror with the store administrator's credentials.
set -eu
MEDDIFF_S3_ACCESS_KEY=$(cat /run/secrets/store_admin_access_key)
MEDDIFF_S3_SECRET_KEY=$(cat /run/secrets/store_admin_secret_key)
export MEDDIFF_S3_ACCESS_KEY MEDDIFF_S3_SECRET_KEY
exec meddiff admin mirror "$@"
