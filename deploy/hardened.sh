#!/bin/sh
# Looks into every running container of the stack: whether it runs as non-root, on a read-only root, without
# capabilities, and can write nowhere but to its volumes and to memory. Prints a line each; 1 where one fails.
#   deploy/hardened.sh [project]        ENGINE=podman where that is what runs them
set -eu
engine=${ENGINE:-docker}
project=${1:-meddiff}
failed=1 # Of no container nothing is known.
seen=0
for name in $("$engine" ps --format '{{.Names}}' --filter "label=com.docker.compose.project=$project"); do
  [ "$seen" = 1 ] || { seen=1; failed=0; }
  user=$("$engine" exec "$name" sh -c "sed -n 's/^Uid:[[:space:]]*\([0-9]*\).*/\1/p' /proc/1/status")
  capabilities=$("$engine" exec "$name" sh -c "sed -n 's/^CapEff:[[:space:]]*//p' /proc/1/status")
  privileges=$("$engine" exec "$name" sh -c "sed -n 's/^NoNewPrivs:[[:space:]]*//p' /proc/1/status")
  root=$("$engine" inspect --format '{{.HostConfig.ReadonlyRootfs}}' "$name")
  volumes=$("$engine" inspect --format '{{range .Mounts}}{{if .RW}}{{.Destination}} {{end}}{{end}}' "$name")
  # Everywhere a write would succeed, but for kernel interfaces, memory and the volumes.
  writable=$("$engine" exec -e VOLUMES="$volumes" "$name" sh -c '
    while read -r _ where kind options _; do
      case "$where" in /proc|/proc/*|/sys|/sys/*|/dev|/dev/*) continue ;; esac
      case ",$options," in *,ro,*) continue ;; esac
      [ "$kind" = tmpfs ] && continue
      case " $VOLUMES " in *" $where "*) continue ;; esac
      [ -w "$where" ] && echo "$where"
    done < /proc/mounts; true')
  verdict=ok
  [ "$user" != 0 ] && [ "$capabilities" = 0000000000000000 ] && [ "$privileges" = 1 ] && [ "$root" = true ] \
    && [ -z "$writable" ] || { verdict=FAILED; failed=1; }
  echo "$name: uid $user, capabilities $capabilities, no new privileges $privileges, read-only root $root," \
    "volumes ${volumes:-none}, writable elsewhere: ${writable:-nothing}: $verdict"
done
exit $failed
