#!/usr/bin/env bash
# Installs everything into .venv and puts it on the PATH of the script that sources this file: the pinned packages of
# requirements.txt, with Python 3.11 to 3.14, and on Linux the EGL libraries that headless rendering needs.
# On Debian and Ubuntu it fetches missing system packages itself when run as root or with password-less sudo.
# bash install.sh metaworld, or adroit, adds what studies/drm_metaworld.py, or drm_adroit.py, needs (for scripts that source
# this file: SUITES="metaworld adroit").
# PyTorch is the build for CPUs, gigabytes smaller, where no NVIDIA driver is seen; GPU=1 or CPU=1 decide
# otherwise, also later.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

fail() { echo "install.sh: $*" >&2; exit 1; }

case "$(uname)" in
  Linux | Darwin) ;;
  *) fail "Windows is not supported; in WSL it installs as on Linux" ;;
esac
suites=${SUITES:-}
[ "${BASH_SOURCE[0]}" != "$0" ] || suites="$suites $*"
for suite in $suites; do
  [ "$suite" = metaworld ] || [ "$suite" = adroit ] || fail "unknown: $suite; known: metaworld, adroit"
done
python=""
for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
  if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
[ -n "$python" ] || fail "needs Python 3.11 to 3.14; found: $(python3 --version 2>&1 || true)"

packages=()
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  packages+=("python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv")
ldconfig=$(PATH="$PATH:/sbin:/usr/sbin" command -v ldconfig || true)
[ "$(uname)" = Darwin ] || { [ -n "$ldconfig" ] && "$ldconfig" -p | grep -q libEGL.so.1; } ||
  packages+=(libegl1 libgl1-mesa-dri libglx-mesa0 libopengl0)
sudo="sudo -n"
[ "$(id -u)" != 0 ] || sudo=""
if [ ${#packages[@]} = 0 ]; then
  :
elif command -v apt-get >/dev/null && $sudo true 2>/dev/null; then
  $sudo apt-get update -qq
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${packages[@]}" >/dev/null
else
  todo="please run: sudo apt-get install ${packages[*]} (or install what they are called on your system)"
  [[ ${packages[0]} != python* ]] || fail "$todo"
  echo "install.sh: nothing can be drawn (dm_control, --capture-video) until you do this; $todo" >&2
fi

.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .venv # anew, if it was left half-made
pip=(.venv/bin/python -m pip install -q --disable-pip-version-check)
before=$(cat .venv/torch-build 2>/dev/null || true) build=gpu
if [ "${GPU:-0}" != 1 ] && [ "$(uname)" = Linux ]; then
  if [ "${CPU:-0}" = 1 ] || [ "$before" = cpu ] || { [ -z "$before" ] && ! command -v nvidia-smi >/dev/null; }; then build=cpu; fi
fi
if [ "${before:-$build}" != "$build" ]; then # pip takes one build for the other
  .venv/bin/python -m pip uninstall -qy torch
  rm -f .venv/installed-requirements.txt
fi
echo "$build" >.venv/torch-build
if [ "$build" = cpu ] && ! cmp -s requirements.txt .venv/installed-requirements.txt; then # where PyTorch's index cannot be reached, from PyPI
  "${pip[@]}" --no-deps --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu "$(grep ^torch== requirements.txt)"
fi
for requirements in requirements.txt ${EXTRA_REQUIREMENTS:-}; do # only what changed since it was last installed
  stamp=.venv/installed-${requirements//\//-}
  if ! cmp -s "$requirements" "$stamp"; then
    echo "installing $requirements into .venv (the first time takes minutes)" >&2
    "${pip[@]}" -r "$requirements"
    if [ "$requirements" = requirements.txt ] && .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 13))'; then
      "${pip[@]}" --no-deps "$(sed -n 's/^dm_control\(==[^ ]*\).*/dm_control\1/p' requirements.txt)" # without labmaze
    fi
    cp "$requirements" "$stamp"
  fi
done
for suite in $suites; do
  if [ "$suite" = metaworld ]; then
    "${pip[@]}" --no-deps --ignore-requires-python metaworld==3.1.1 # it asks for an older MuJoCo, and for Python below 3.14
  else
    "${pip[@]}" gymnasium-robotics==1.4.2 -c requirements.txt
  fi
done
PATH="$PWD/.venv/bin:$PATH"
