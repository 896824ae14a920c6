#!/usr/bin/env bash
# Makes .venv with all that fastbyol can use. The core (folder backend, training, evaluation) needs torch only: a missing optional part is
# said and passed over, and the next `make install` tries again, for only a complete installation writes .venv/installed.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
# For ffcv (built from source) and the demo's photographs. libopencv-dev would pull 249 packages; two of its parts are enough.
PACKAGES=(python3-venv g++ pkg-config libturbojpeg0-dev libopencv-core-dev libopencv-imgproc-dev dataset-fashion-mnist)
# ffcv and torch.compile build extensions of Python. Debian's own Python has its headers in a package; others bring them.
"$PYTHON" -c 'import pathlib, sysconfig; pathlib.Path(sysconfig.get_path("include"), "Python.h").stat()' 2>/dev/null || PACKAGES+=(python3-dev)
# PyPI's opencv-python, which `import ffcv` imports, loads two libraries that a server may lack. Asked for by file, for later releases call the second package libglib2.0-0t64.
has_library() { PATH=$PATH:/sbin ldconfig -p 2>/dev/null | grep -F "$1 " >/dev/null; }
has_library libGL.so.1 || PACKAGES+=(libgl1)
has_library libgthread-2.0.so.0 || PACKAGES+=(libglib2.0-0)

say() { printf 'install: %s\n' "$*"; }
missing_part() {
  say "$*"
  complete=no
}

debian_packages() {
  if ! command -v apt-get >/dev/null; then
    say "no apt-get here. ffcv needs a C++ compiler, pkg-config, TurboJPEG and OpenCV (core, imgproc) headers: install them by your system's means."
    return
  fi
  local missing=()
  for package in "${PACKAGES[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  if [ ${#missing[@]} -eq 0 ]; then return; fi
  local root=()
  if [ "$(id -u)" != 0 ]; then
    if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
      root=(sudo)
    else
      missing_part "not root: ask an administrator for: apt-get install --no-install-recommends ${missing[*]}"
      return
    fi
  fi
  say "Debian packages: ${missing[*]}"
  { "${root[@]}" apt-get update -qq && DEBIAN_FRONTEND=noninteractive "${root[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}"; } ||
    missing_part "apt-get failed; ffcv or the fashion demo may be missing"
}

complete=yes
debian_packages
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
PIP=("$VENV/bin/python" -m pip install --quiet --constraint constraints.txt)
say "torch and the core"
"${PIP[@]}" --editable '.[dev,lint,docs]'
say "DALI"
"${PIP[@]}" --editable '.[dali]' || missing_part "DALI could not be installed: the dali backend will say so when asked for"
say "ffcv (built from source)"
PKG_CONFIG_PATH="$PWD/scripts/ffcv_build/pc:${PKG_CONFIG_PATH:-}" "${PIP[@]}" --editable '.[ffcv]' ||
  missing_part "ffcv could not be built: the ffcv backend and to_ffcv.py will say so when asked for"
"$VENV/bin/python" -c "import fastbyol; print('install: fastbyol', fastbyol.__version__, 'is ready (. $VENV/bin/activate)')"
if [ $complete = yes ]; then touch "$VENV/installed"; else rm -f "$VENV/installed"; fi
