#!/bin/sh
# Build an image, start its service on loopback, wait for /readyz, embed one spectrum, stop.
#
#   docker/smoke.sh [cpu|gpu]
#
# With a Docker engine the image is built and run by Docker. Without one it is built by buildah with chroot
# isolation on a debootstrap base (root, and the packages buildah and debootstrap, are needed).
#   PORT               where the container listens on 127.0.0.1 (default 18000)
#   BASE               base image, as the Dockerfile's argument
#   EXTRA_BUILD_ARGS   more arguments of the build, e.g. "-v /etc/pip.conf:/etc/pip.conf:ro" where pip needs a mirror
#   DEBIAN_MIRROR      where debootstrap finds Debian
#   READY_S            seconds until /readyz must answer (default 120)
#   KEEP=1             leave image and storage in place
set -eu

target=${1:-cpu}
port=${PORT:-18000}
url=http://127.0.0.1:$port
image=astroclip-smoke:$target
cd "$(dirname "$0")/.."
work=$(mktemp -d "${TMPDIR:-/tmp}/astroclip-smoke.XXXXXX")
stop=true

say() { echo "smoke: $*"; }
fail() { say "FAILED: $*" >&2; exit 1; }
finish() {
    status=$?
    trap - EXIT
    $stop || true
    [ "$status" -eq 0 ] || { [ ! -f "$work/service.log" ] || tail -40 "$work/service.log" >&2; }
    [ -n "${KEEP:-}" ] || { clean || true; rm -rf "$work"; }
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM

docker_build() {
    # shellcheck disable=SC2086  # arguments are words
    docker build -f docker/Dockerfile --target "$target" -t "$image" ${BASE:+--build-arg "BASE=$BASE"} \
        ${EXTRA_BUILD_ARGS:-} .
}
docker_start() {
    docker run -d --name "astroclip-smoke-$$" --read-only --tmpfs /tmp --tmpfs /home/astroclip \
        -p "127.0.0.1:$port:8000" "$image" >/dev/null
    stop=docker_stop
}
docker_stop() {
    docker logs "astroclip-smoke-$$" >"$work/service.log" 2>&1
    docker rm -f "astroclip-smoke-$$" >/dev/null
}
docker_health() { docker inspect --format '{{json .Config.Healthcheck.Test}}' "$image"; }
docker_user() { docker run --rm --entrypoint id "$image" -u; }
docker_clean() { docker rmi -f "$image" >/dev/null; }

store() { buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs "$@"; }
buildah_build() {
    if [ -z "${BASE:-}" ]; then
        say "debootstrap of the base image"
        debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$work/base" \
            ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} >"$work/debootstrap.log" 2>&1 \
            || { tail -5 "$work/debootstrap.log" >&2; fail "debootstrap"; }
        rm -rf "$work"/base/var/cache/apt/* "$work"/base/var/lib/apt/lists/*
        printf 'FROM scratch\nCOPY . /\n' >"$work/Basefile"
        store bud -q -f "$work/Basefile" -t localhost/astroclip-base "$work/base" >/dev/null
        rm -rf "$work/base"
        BASE=localhost/astroclip-base
    fi
    # The Docker format, because OCI has no health check. Few copies on disk: vfs stores every layer whole.
    # shellcheck disable=SC2086
    store bud --isolation chroot --format docker -f docker/Dockerfile --target "$target" -t "$image" \
        --build-arg "BASE=$BASE" ${EXTRA_BUILD_ARGS:-} .
    container=$(store from "$image")
}
buildah_start() {
    # Chroot isolation shares the host's network, so the container listens on the port itself.
    store run --isolation chroot --env "ASTROCLIP_PORT=$port" "$container" -- \
        astroclip demo --host 127.0.0.1 --port "$port" >"$work/service.log" 2>&1 &
    service=$!
    stop=buildah_stop
}
buildah_stop() {
    # buildah passes no signal on: end the service itself, the Python process among the descendants of `buildah run`.
    for pid in $(descendants "$service"); do
        case $(tr '\0' ' ' <"/proc/$pid/cmdline") in */python*astroclip\ demo*) kill -TERM "$pid" ;; esac
    done
    wait "$service" || true
}
descendants() {
    for child in $(cat /proc/"$1"/task/*/children 2>/dev/null); do
        echo "$child"
        descendants "$child"
    done
}
buildah_health() { store inspect --type image --format '{{.Docker.Config.Healthcheck.Test}}' "$image"; }
buildah_user() { store run --isolation chroot "$container" -- id -u; }
buildah_clean() { store rm -a >/dev/null; store rmi -a -f >/dev/null; }

if docker info >/dev/null 2>&1; then
    engine=docker
elif command -v buildah >/dev/null && command -v debootstrap >/dev/null; then
    engine=buildah
else
    clean() { :; }
    fail "found neither a Docker engine nor buildah and debootstrap; mend: apt-get install buildah debootstrap"
fi
clean() { "${engine}_clean"; }

say "building $image with $engine"
"${engine}_build"
"${engine}_health" | grep -q /readyz || fail "the image has no health check"

say "starting the service on $url"
began=$(date +%s)
"${engine}_start"
until curl -fsS -o /dev/null "$url/readyz" 2>/dev/null; do
    [ $(($(date +%s) - began)) -lt "${READY_S:-120}" ] || fail "not ready after ${READY_S:-120} s"
    sleep 1
done
say "ready after $(($(date +%s) - began)) s"
user=$("${engine}_user")
[ "$user" != 0 ] || fail "the container runs as root"

# A spectrum any awk can make: a red continuum with one strong line.
awk 'BEGIN { print "wave,flux,ivar"
    for (w = 3600; w < 9824; w += 2) printf "%d,%.4f,4.0\n", w, 1 + w / 5000 + 20 * exp(-((w - 7000) / 8) ^ 2) }' >"$work/spectrum.csv"
curl -fsS --data-binary @"$work/spectrum.csv" -H 'content-type: text/csv' "$url/v1/embed/spectrum" -o "$work/answer.json" \
    || fail "the upload was refused"
grep -q '"embedding"' "$work/answer.json" || fail "no embedding in the answer: $(head -c 300 "$work/answer.json")"
code=$(printf 'SIMPLE  = nonsense' | curl -sS -o /dev/null -w '%{http_code}' --data-binary @- \
    -H 'content-type: application/fits' "$url/v1/embed/image")
case $code in 4??) ;; *) fail "a damaged upload was answered $code, wanted 4xx" ;; esac
curl -fsS -o /dev/null "$url/readyz" || fail "not ready after a damaged upload"
say "OK: ready, one spectrum embedded, a damaged upload refused with $code, user $user"
