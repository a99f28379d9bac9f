#!/bin/sh
# Makes the secrets that docker-compose.yml reads, each a file in deploy/secrets/ that git and the images leave out.
# What is there stays: to change one, delete its file first (and the Redis URL with the Redis password).
set -eu
folder=$(cd "$(dirname "$0")" && pwd)/secrets
umask 077
mkdir -p "$folder"
keep() { # name, bytes of randomness
  [ -s "$folder/$1" ] || head -c "$2" /dev/urandom | od -An -tx1 | tr -d ' \n' > "$folder/$1"
}
keep redis_password 24
[ -s "$folder/meddiff_redis_url" ] \
  || printf 'redis://:%s@redis:6379/0' "$(cat "$folder/redis_password")" > "$folder/meddiff_redis_url"
keep store_admin_access_key 10
keep store_admin_secret_key 24
keep meddiff_s3_access_key 10
keep meddiff_s3_secret_key 24
keep grafana_admin_password 16
# The containers' users read them; nobody else enters the folder.
chmod 0644 "$folder"/*
echo "secrets are in $folder"
