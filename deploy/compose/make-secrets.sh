#!/usr/bin/env bash
# Writes the secrets of the compose file, once: random, readable by you alone, ignored by git.
#   deploy/compose/make-secrets.sh
set -euo pipefail
folder="${1:-$(dirname "$0")/secrets}"
umask 077
mkdir -p "$folder"
random() { head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n'; }
if [[ -e "$folder/pgpass" ]]; then
  echo "$folder has secrets already; the databases know them, so they stay" >&2
  exit 0
fi
random > "$folder/ray_token"
random > "$folder/postgres_password"
# libpq reads passwords from here by PGPASSFILE, so that no URL and no command line holds one.
printf '*:*:*:caddie:%s\n' "$(cat "$folder/postgres_password")" > "$folder/pgpass"
echo "wrote $folder/ray_token, postgres_password and pgpass"
