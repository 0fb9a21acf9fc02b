#!/bin/sh
# Prepares volumes and secrets before the services start, as the one-shot service `init`.
# It makes what is missing and leaves alone what is there: to renew or replace a secret, delete
# its file, or put your own in its place, and start again.
#
#   /secrets   SECRETS_DIR of the host; each service sees only the folder of its name
#   TLS_NAMES  by which clients call the control plane too, like DNS:llm.example.org,IP:192.0.2.7
set -eu
umask 027

service_id=10001                  # the user of every container
owner=$(stat -c %u /secrets)      # the operator, who reads the client's folder from outside
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

say() { echo "init: $*"; }

# Puts a file in place as a whole: whoever finds it finds all of it.
give() { # FROM TO [MODE]
  folder=$(dirname "$2")
  mkdir -p "$folder"
  chown "$owner:$service_id" "$folder"
  chmod 0750 "$folder"
  cp "$1" "$2.part"
  chown "$owner:$service_id" "$2.part"
  chmod "${3:-0640}" "$2.part"
  mv "$2.part" "$2"
  say "made $2"
}

# A certificate of our own authority, beside its key.
certificate() { # FOLDER SUBJECT_ALT_NAMES
  [ ! -s "$1/tls.crt" ] || [ ! -s "$1/tls.key" ] || return 0
  openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=omniserve" \
    -addext "subjectAltName=$2" -keyout "$work/key" -out "$work/request" 2>/dev/null
  openssl x509 -req -in "$work/request" -CA /secrets/ca/ca.crt -CAkey /secrets/ca/ca.key \
    -CAcreateserial -CAserial "$work/serial" -copy_extensions copyall -days 825 -out "$work/certificate" 2>/dev/null
  give "$work/key" "$1/tls.key"
  give "$work/certificate" "$1/tls.crt"
}

if [ ! -s /secrets/ca/ca.crt ] || [ ! -s /secrets/ca/ca.key ]; then
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 \
    -subj "/CN=OmniServe local authority" -addext keyUsage=critical,keyCertSign,cRLSign \
    -keyout "$work/key" -out "$work/certificate" 2>/dev/null
  give "$work/key" /secrets/ca/ca.key 0600
  give "$work/certificate" /secrets/ca/ca.crt
fi
for folder in client controlplane gpuworker redis; do
  cmp -s /secrets/ca/ca.crt "/secrets/$folder/ca.crt" || [ -s "/secrets/$folder/ca.crt" ] ||
    give /secrets/ca/ca.crt "/secrets/$folder/ca.crt"
done

names=DNS:localhost,DNS:controlplane,IP:127.0.0.1,IP:::1${TLS_NAMES:+,$TLS_NAMES}
certificate /secrets/controlplane "$names"
certificate /secrets/redis DNS:redis,DNS:localhost

if [ ! -s /secrets/controlplane/api-keys ]; then
  openssl rand -hex 32 >"$work/api-key"
  give "$work/api-key" /secrets/controlplane/api-keys
  give "$work/api-key" /secrets/client/api-key
fi
if [ ! -s /secrets/redis/redis-password ]; then
  openssl rand -hex 32 >"$work/password"
  give "$work/password" /secrets/controlplane/redis-password
  give "$work/password" /secrets/gpuworker/redis-password
  printf 'requirepass %s\n' "$(cat "$work/password")" >"$work/auth.conf"
  give "$work/auth.conf" /secrets/redis/auth.conf
  give "$work/password" /secrets/redis/redis-password  # last: it says that all are there
fi

# Volumes begin as root's.
chown "$service_id:$service_id" /redis /latency-cache
for model in /usr/share/omniserve/models/*; do
  cmp -s "$model" "/models/$(basename "$model")" || {
    cp "$model" /models/
    chmod 0644 "/models/$(basename "$model")"
    say "copied $(basename "$model")"
  }
done
chmod 0755 /models
say "ready"
