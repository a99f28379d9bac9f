#!/bin/sh
# Redis with a password from a file and an append-only log: a restart forgets nothing that was acknowledged a second
# before. What it forgets all the same is found again in the object store.
set -eu
umask 077
printf 'requirepass %s\n' "$(cat /run/secrets/redis_password)" > /tmp/redis.conf
exec redis-server /tmp/redis.conf --dir /data --appendonly yes --appendfsync everysec --maxmemory-policy noeviction
