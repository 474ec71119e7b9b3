# Sourced by scripts/demo and scripts/test: `install NAME EXTRAS` makes .venv and installs d2m with
# the extras from constraints.txt. Nothing happens when that was done before for the same files.
#
# - uv where present or installable by pip (seconds), else pip (minutes). uv does not read pip's
#   configuration, so it is handed pip's indexes and find-links.
# - Without an NVIDIA GPU the CPU build of torch: its CUDA build is gigabytes. D2M_TORCH=cpu or
#   D2M_TORCH=cuda decides by hand.

say() { printf '[install %3ds] %s\n' "$SECONDS" "$*" >&2; }
stop() { printf 'error: %s\n' "$*" >&2; exit 2; }

# The first Python 3.11 to 3.13 that runs (a pyenv shim may exist and not run); 3.11 is the one
# that the constraints are tested with most.
find_python() {
  local name
  for name in ${D2M_PYTHON:-} python3.11 python3.12 python3.13 python3 python; do
    if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
      2>/dev/null; then
      printf '%s\n' "$name"
      return
    fi
  done
  return 1
}

make_venv() {
  local python
  if [ -x .venv/bin/python ]; then
    .venv/bin/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' ||
      stop ".venv holds a Python that is not 3.11 to 3.13; remove .venv and run this again"
    return
  fi
  if python=$(find_python); then
    say "making .venv with $("$python" --version)"
    if "$python" -m venv .venv 2>/dev/null; then return; fi
    rm -rf .venv
    if uv --version >/dev/null 2>&1; then uv venv --quiet --python "$python" .venv; return; fi
    stop "$python cannot make a virtual environment; install its venv package" \
      "(Debian, Ubuntu: apt install python3-venv) or uv, and run this again"
  fi
  if uv --version >/dev/null 2>&1; then
    say "no Python 3.11 to 3.13 found, uv fetches one"
    uv venv --quiet --python 3.11 .venv
    return
  fi
  stop "no Python 3.11, 3.12 or 3.13 found; install one (or set D2M_PYTHON to its path)"
}

# Shell lines that give uv what pip is configured with. Through the environment and not as
# arguments, since an index address may hold a password. What the user set for uv stays.
pip_settings_for_uv() {
  .venv/bin/python - <<'PY'
import ast, os, shlex, subprocess, sys

for command in ([sys.executable, "-m", "pip"], ["pip"], ["pip3"]):
    try:
        done = subprocess.run([*command, "config", "list"], capture_output=True, text=True)
    except OSError:
        continue
    if done.returncode == 0:
        break
else:
    sys.exit()
found = {}
# Later lines win, as in pip: configuration files first (global, install), then the environment.
for line in sorted(done.stdout.splitlines(), key=lambda line: line.startswith(":env:")):
    name, _, value = line.partition("=")
    section, _, key = name.rpartition(".")
    if section in ("global", "install", ":env:"):
        found[key] = ast.literal_eval(value).split()
table = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "cert": ("SSL_CERT_FILE", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
}
for key, (name, separator) in table.items():
    if key in found and name not in os.environ:
        print(f"export {name}={shlex.quote(separator.join(found[key]))}")
if found.get("no-index", [""])[0].lower() in ("1", "true", "yes", "on"):
    print("export UV_NO_INDEX=1")
# pip takes the best version of all its indexes; so does uv when told.
if "UV_INDEX_STRATEGY" not in os.environ:
    print("export UV_INDEX_STRATEGY=unsafe-best-match")
PY
}

find_uv() {
  if uv --version >/dev/null 2>&1; then
    UV=uv
  elif [ -x .venv/bin/uv ]; then
    UV=.venv/bin/uv
  elif timeout 90 .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --retries 1 uv 2>/dev/null; then
    UV=.venv/bin/uv
  else
    UV=
    say "uv is not to be had, pip does the work (this can take minutes)"
    return
  fi
  eval "$(pip_settings_for_uv)"
}

# get ARGUMENTS...: pip install with the constraints, by uv or by pip.
get() {
  if [ -n "$UV" ]; then
    "$UV" pip install --quiet --python .venv/bin/python --constraint constraints.txt "$@"
  else
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
      --constraint constraints.txt "$@"
  fi
}

has_gpu() {
  case "${D2M_TORCH:-auto}" in
    cpu) return 1 ;;
    cuda) return 0 ;;
    auto) nvidia-smi -L 2>/dev/null | grep -q GPU ;;
    *) stop "D2M_TORCH is '$D2M_TORCH', expected cpu, cuda or auto" ;;
  esac
}

# torch first and alone, so that nothing else decides which build comes.
get_torch() {
  local version
  version=$(sed -n 's/^torch==//p' constraints.txt)
  if .venv/bin/python - "$version" <<'PY'
import importlib.metadata, sys
try:
    found = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    sys.exit(1)
sys.exit(found.split("+")[0] != sys.argv[1])
PY
  then
    return
  fi
  if has_gpu || [ "$(uname -s)" != Linux ]; then
    say "installing torch $version"
    get "torch==$version"
    return
  fi
  # ==VERSION+cpu matches the CPU build alone, so no CUDA build can slip in here.
  say "no NVIDIA GPU: installing the CPU build of torch $version from where pip looks"
  if get "torch==$version+cpu" 2>/dev/null; then return; fi
  if [ -n "$UV" ]; then
    say "not there: asking PyTorch's own index for it (uv --torch-backend cpu)"
    if UV_HTTP_TIMEOUT=20 get --torch-backend cpu "torch==$version"; then return; fi
  fi
  say "no CPU build found: installing torch as pip finds it (the CUDA build, gigabytes)"
  get "torch==$version"
}

# install NAME EXTRAS
install() {
  local name=$1 extras=$2 stamp want
  make_venv
  stamp=.venv/.d2m-$name
  want=$(cat pyproject.toml constraints.txt | cksum; echo "$extras ${D2M_TORCH:-auto}"; pwd)
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then return; fi
  find_uv
  say "with ${UV:-pip}: the extras $extras into .venv, versions from constraints.txt"
  get_torch
  get --editable ".[$extras]"
  printf '%s\n' "$want" >"$stamp"
  say "installed"
}

# TensorRT-RTX has packages for Linux on x86-64 (and Windows) only.
with_rtx() {
  if [ "$(uname -sm)" = "Linux x86_64" ]; then printf '%s,trt-rtx' "$1"; else printf '%s' "$1"; fi
}
