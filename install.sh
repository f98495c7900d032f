#!/usr/bin/env bash
# Installs everything into .venv and puts it on the PATH of the script that sources this file:
#   Python 3.11 or 3.12, the pinned packages of requirements.txt, and the EGL libraries that headless rendering needs.
# On Debian and Ubuntu it fetches missing system packages itself when run as root or with password-less sudo.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

fail() { echo "install.sh: $*" >&2; exit 1; }

python=""
for candidate in python3 python3.12 python3.11; do
  if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
[ -n "$python" ] || fail "needs Python 3.11 or 3.12; found: $(python3 --version 2>&1 || true)"

packages=()
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  packages+=("python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv")
ldconfig=$(PATH="$PATH:/sbin:/usr/sbin" command -v ldconfig || true)
{ [ -n "$ldconfig" ] && "$ldconfig" -p | grep -q libEGL.so.1; } ||
  packages+=(libegl1 libgl1-mesa-dri libglx-mesa0 libopengl0)
if [ ${#packages[@]} -gt 0 ]; then
  if ! command -v apt-get >/dev/null; then
    fail "please install the equivalents of these Debian packages: ${packages[*]}"
  elif [ "$(id -u)" = 0 ]; then
    sudo=""
  elif sudo -n true 2>/dev/null; then
    sudo="sudo"
  else
    fail "please run: sudo apt-get install ${packages[*]}"
  fi
  $sudo apt-get update -qq
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${packages[@]}" >/dev/null
fi

[ -x .venv/bin/python ] || "$python" -m venv .venv
for requirements in requirements.txt ${EXTRA_REQUIREMENTS:-}; do # only what changed since it was last installed
  stamp=.venv/installed-${requirements//\//-}
  if ! cmp -s "$requirements" "$stamp"; then
    echo "installing $requirements into .venv (the first time takes minutes)" >&2
    .venv/bin/python -m pip install -q --disable-pip-version-check -r "$requirements"
    cp "$requirements" "$stamp"
  fi
done
PATH="$PWD/.venv/bin:$PATH"
