#!/usr/bin/env bash
# Builds the Dockerfile's stages and runs them where there is neither Docker nor a registry: buildah
# with chroot isolation, on a Debian of debootstrap in place of python:3.11-slim. To try the
# Dockerfile, not to publish what comes out. As root on Debian or Ubuntu:
#
#   apt-get install buildah crun debootstrap
#   scripts/container.sh [runtime] [toolchain]
#
# BASE_DIR keeps the base from run to run (default: /var/tmp/d2m-container). pip's own settings (an
# index, find-links, a certificate) are handed on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
say() { printf '[container %4ds] %s\n' "$SECONDS" "$*" >&2; }
stop() { printf 'error: %s\n' "$*" >&2; exit 2; }

stages=("$@")
[ "${#stages[@]}" -gt 0 ] || stages=(runtime toolchain)
for stage in "${stages[@]}"; do
  case "$stage" in
    runtime | toolchain) ;;
    --help | -h) printf 'usage: scripts/container.sh [runtime] [toolchain]\n'; exit 0 ;;
    *) stop "the stage is '$stage', expected runtime or toolchain" ;;
  esac
done
for tool in buildah debootstrap; do
  command -v "$tool" >/dev/null || stop "$tool is missing: apt-get install buildah crun debootstrap"
done
[ "$(id -u)" = 0 ] || stop "debootstrap needs root"

work=${BASE_DIR:-/var/tmp/d2m-container}
base=$work/base
image=docker.io/library/python:3.11-slim debian=localhost/d2m-debian:12
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=${STORAGE_DRIVER:-overlay}
store=(--root "$work/storage" --runroot "$work/run")
mkdir -p "$work"

# Debian 12 has Python 3.11. Its pip refuses to install beside the system's packages, which the
# image's does not.
if [ ! -f "$base/usr/local/bin/python" ]; then
  say "debootstrap: Debian 12 with Python 3.11 in $base"
  rm -rf "$base"
  debootstrap --variant=minbase --include=python3,python3-pip,ca-certificates bookworm "$base" \
    >"$work/debootstrap.log" 2>&1 || stop "debootstrap failed, see $work/debootstrap.log"
  rm -rf "$base"/usr/lib/python3*/EXTERNALLY-MANAGED "$base"/var/cache/apt/archives/*.deb
  ln -s /usr/bin/python3 "$base/usr/local/bin/python"
fi
if ! buildah "${store[@]}" inspect --type image "$debian" >/dev/null 2>&1; then
  say "the base as $debian"
  container=$(buildah "${store[@]}" from scratch)
  buildah "${store[@]}" copy --quiet "$container" "$base" / >/dev/null
  buildah "${store[@]}" config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
  buildah "${store[@]}" commit --quiet --rm "$container" "$debian" >/dev/null
fi

# pip's settings, for pip and uv: variables of the base (those of `bud --env` come after its RUN
# lines), and files that they name at the same path.
variables=() volumes=()
while IFS= read -r row; do
  case "$row" in --env=*) variables+=("$row") ;; *) volumes+=("$row") ;; esac
done < <(python3 - <<'PY'
import ast, os, subprocess, sys

done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
names = {"index-url": "UV_DEFAULT_INDEX", "find-links": "UV_FIND_LINKS", "cert": "SSL_CERT_FILE"}
for line in done.stdout.splitlines():
    name, _, value = line.partition("=")
    key = name.rpartition(".")[2]
    if key in names:
        text = ast.literal_eval(value)
        for variable in ("PIP_" + key.replace("-", "_").upper(), names[key]):
            print(f"--env={variable}={text.replace(' ', ',') if variable.startswith('UV_') else text}")
        if key == "cert":  # releases of uv differ in what they read
            print("--env=UV_SYSTEM_CERTS=1", "--env=UV_NATIVE_TLS=1", sep="\n")
        for path in text.split():
            if os.path.exists(path):
                print(f"--volume={path}:{path}:ro")
PY
)
container=$(buildah "${store[@]}" from "$debian")
buildah "${store[@]}" config ${variables[@]+"${variables[@]}"} "$container"
buildah "${store[@]}" commit --quiet --rm "$container" "$image" >/dev/null

# With a CPU build of torch at hand it is taken from there, in place of PyTorch's own index.
torch=()
if printf '%s\n' ${variables[@]+"${variables[@]}"} | grep -q '^--env=UV_FIND_LINKS='; then
  torch=(--build-arg TORCH_BACKEND=)
fi

run() { # STAGE ARGUMENTS...: as `docker run --rm -v OUT:/work d2m-STAGE ARGUMENTS`
  local stage=$1 container
  shift
  container=$(buildah "${store[@]}" from "d2m-$stage")
  # buildah's own entry point is the shell's; the image's is `d2m`.
  buildah "${store[@]}" run --volume "$work/out:/work" "$container" -- d2m "$@"
  buildah "${store[@]}" rm "$container" >/dev/null
}

mkdir -p "$work/out"
chown 1000:1000 "$work/out"
for stage in "${stages[@]}"; do
  say "building $stage"
  buildah "${store[@]}" bud --layers=false --pull-never --network host ${volumes[@]+"${volumes[@]}"} \
    ${torch[@]+"${torch[@]}"} --target "$stage" --tag "d2m-$stage" . >"$work/$stage.log" 2>&1 ||
    stop "the stage $stage was not built, see $work/$stage.log"
  say "$stage is built: $(buildah "${store[@]}" images --format '{{.Size}}' "d2m-$stage")"
done
for stage in "${stages[@]}"; do
  [ "$stage" = runtime ] || run "$stage" plan flux-dev --preset L
  run "$stage" run "a red circle" -o /work/"$stage".png
  [ -s "$work/out/$stage.png" ] || stop "$stage left no image"
done
if [[ " ${stages[*]} " == *" runtime "* ]]; then
  say "serving"
  python3 - "$(declare -p store | sed 's/.*(\(.*\))/\1/')" <<'PY' || stop "serve did not answer"
import json, shlex, subprocess, sys, time, urllib.request

store = [part.partition("=")[2] for part in shlex.split(sys.argv[1])]
container = subprocess.run(["buildah", *store, "from", "d2m-runtime"], capture_output=True, text=True).stdout.strip()
command = ["buildah", *store, "run", container, "--", "d2m", "serve", "--port", "18765"]
server = subprocess.Popen(command)
address = "http://127.0.0.1:18765"
try:
    for _ in range(240):
        try:
            urllib.request.urlopen(address + "/readyz", timeout=5)
            break
        except OSError:
            time.sleep(0.5)
    body = json.dumps({"prompt": "a red circle"}).encode()
    asked = urllib.request.Request(address + "/v1/images/generations", body, {"Content-Type": "application/json"})
    answer = json.load(urllib.request.urlopen(asked, timeout=120))
    assert answer["data"][0]["b64_json"]
    print("serve: one image over HTTP")
finally:
    server.terminate()
    server.wait(60)
    subprocess.run(["buildah", *store, "rm", container], capture_output=True)
PY
fi
say "done: images in $work/out"
