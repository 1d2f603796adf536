#!/usr/bin/env bash
# Installs what Widebatch needs, for the Makefile:  launch/setup.sh base [bench] [docs] [browser] [slurm]
#   base   .venv with requirements.lock, FFCV and this checkout
#   bench  the peers that benchmarks measure us against
#   docs   Sphinx, which builds docs/
#   browser  Debian's Chromium, in which tests open reports
#   slurm  Debian's Slurm packages, from which slurm/local_cluster.sh makes its cluster, and what else
#          of Debian's the tests use: Prometheus, libfaketime, zsh and fish
# What is done is not done again; what was interrupted goes on. Settings, from the environment:
#   PYTHON=/path/to/python3.11   the interpreter for .venv (default: the first 3.11 or 3.12 found)
#   FFCV=no                      do without FFCV and its system packages
#   SLURM=no                     do without Slurm and the others of that stage
#   BROWSER=no                   do without Chromium
# shellcheck disable=SC2317  # most functions are called by name
set -euo pipefail
root=$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=$root/.venv
state=$venv/.setup # stamps and the log
log=$state/setup.log
shim=$root/data_pipeline/ffcv_build
# What pip is asked for before all else: torch and its CUDA libraries are nine tenths of the bytes;
# setuptools, which Python 3.12's environments come without, builds what has no wheel.
first='^(setuptools|torch|torchvision|triton|cuda-.*|nvidia-.*)=='
# What `pip check` may say: ffcv's needs that nothing here imports (requirements.lock says why), and
# no FFCV where it could not be built.
known_gaps='^ffcv .* requires (assertpy|fastargs|opencv-python|pytorch-pfn-extras|terminaltables),'
known_gaps+='|^widebatch .* requires ffcv,|^No broken requirements'

say() { printf '[setup] %s\n' "$@"; }
die() {
  echo >&2
  say "$@" >&2
  exit 1
}

# ---- system packages -------------------------------------------------------------------------

missing=()
need() { # need TEST PACKAGE...: when TEST fails, note the first PACKAGE that this system's apt knows
  local package
  "$1" && return
  shift
  for package; do
    apt-cache show "$package" >/dev/null 2>&1 && break
    package=$1
  done
  missing+=("$package")
}
has_compiler() { command -v g++ >/dev/null; }
has_pkg_config() { command -v pkg-config >/dev/null; }
has_turbojpeg() { compiles turbojpeg.h; }
has_opencv_core() { compiles opencv4/opencv2/core.hpp; }
has_opencv_imgproc() { compiles opencv4/opencv2/imgproc.hpp; }
has_tbb() { PATH=$PATH:/sbin:/usr/sbin ldconfig -p | grep -q 'libtbb\.so\.12 '; }
has_python() { find_python >/dev/null; }
# pyenv's and conda's Pythons bring headers and ensurepip, Debian's are in packages of their own.
has_headers() {
  "$(find_python)" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))'
}
has_ensurepip() { "$(find_python)" -c 'import ensurepip, venv' 2>/dev/null; }
has_munge() { PATH=$PATH:/usr/sbin command -v munged >/dev/null; }
has_slurmctld() { PATH=$PATH:/usr/sbin command -v slurmctld >/dev/null; }
has_slurmd() { PATH=$PATH:/usr/sbin command -v slurmd >/dev/null; }
has_faketime() { ls /usr/lib/*/faketime/libfaketime.so.1 >/dev/null 2>&1; }
has_slurm_client() { command -v sbatch >/dev/null; }
has_promtool() { command -v promtool >/dev/null && command -v prometheus >/dev/null; }
has_zsh() { command -v zsh >/dev/null; }
has_fish() { command -v fish >/dev/null; }
has_chromium() { command -v chromium >/dev/null; }
has_ip() { PATH=$PATH:/sbin:/usr/sbin command -v ip >/dev/null; }
compiles() { # is this header there? Without a compiler nobody can tell, and its package is cheap.
  has_compiler && printf '#include <%s>\n' "$1" | g++ -I/usr/include/opencv4 -fsyntax-only -x c++ - 2>/dev/null
}

install_missing() { # install_missing WHAT_FOR WITHOUT
  [ ${#missing[@]} -gt 0 ] || return 0
  local packages="${missing[*]}" as_root=()
  missing=()
  if [ "$(id -u)" != 0 ]; then
    as_root=(sudo)
    command -v sudo >/dev/null && { [ -t 0 ] || sudo -n true 2>/dev/null; } || as_root=(false)
  fi
  if ! command -v apt-get >/dev/null; then
    die "$1 needs these, by their Debian names: $packages" \
      "This system has no apt: install what it calls them, then run the same command again." "$2"
  fi
  if [ "${as_root[*]}" != false ]; then
    say "apt: $packages (for $1)"
    # An old or broken list of one source must not stop the rest.
    "${as_root[@]}" apt-get update -qq >>"$log" 2>&1 || true
    # shellcheck disable=SC2086  # a list of package names
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      -o DPkg::Lock::Timeout=120 $packages >>"$log" 2>&1 && return
    tail -n 15 "$log" >&2
  fi
  die "$1 needs system packages that this user cannot install. Run these as root:" \
    "    apt-get update" \
    "    apt-get install -y --no-install-recommends $packages" \
    "then the same command again. $2"
}

# ---- Python ----------------------------------------------------------------------------------

works() { # a Python 3.11 or 3.12? pyenv's shims are there for versions that are not, so run it
  "$1" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null
}
find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    works "$PYTHON" && command -v "$PYTHON"
    return
  fi
  for candidate in "$venv/bin/python" python3.11 python3.12 python3 python \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[12].*/bin/python; do
    works "$candidate" && command -v "$candidate" && return
  done
  return 1
}

is_ready() { # the environment in $venv: its own Python works, and it was made right here
  # Without its pyvenv.cfg the interpreter would take the system's packages for its own, and change
  # them; the scripts hold the path, so an environment does not move.
  works "$venv/bin/python" && grep -qsF "$venv" "$venv/bin/activate" &&
    "$venv/bin/python" -c 'import sys; sys.exit(sys.prefix != sys.argv[1])' "$venv"
}
make_venv() {
  local python build='import sys; print(sys.base_prefix, sys.version)'
  python=$(find_python)
  is_ready && [ "$("$venv/bin/python" -c "$build")" = "$("$python" -c "$build")" ] && return
  if [ "$python" = "$venv/bin/python" ]; then # about to be deleted: whose was it?
    python=$("$python" -c 'import sys; print(sys.base_prefix, "bin/python%d.%d" % sys.version_info[:2], sep="/")')
  fi
  # --clear would empty the folder that a link leads to, which is somebody's environment.
  [ ! -L "$venv" ] || die "$venv is a link to $(readlink -f "$venv"), which is not this checkout's:" \
    "delete the link, and run the same command again."
  say "$("$python" -V), $python: making .venv"
  "$python" -m venv --clear "$venv" >&2 || die "Could not make $venv with $python."
  is_ready || die "$venv is not an environment of its own after $python -m venv; delete it and try again."
  mkdir -p "$state"
}

pip() { # quietly, into the log; TMPDIR because /tmp is often too small for 3 GB of downloads
  is_ready || die "$venv was changed meanwhile; run the same command again."
  mkdir -p "$state/tmp"
  TMPDIR=$state/tmp "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@" </dev/null
}
# The lock is the whole closure: --no-deps installs it as it is and resolves nothing.
pip_install() { pip install --no-deps --no-build-isolation "$@"; }
pins() { grep -E '^[A-Za-z0-9_.-]+==' "$@"; }

step() { # step TITLE COMMAND...: into the log, with a sign of life every 20 s
  local title=$1 begun=$SECONDS beat status=0
  shift
  say "$title"
  { echo "== $title: $*"; } >>"$log"
  while read -rt 20 <> <(:) || true; do
    say "  $((SECONDS - begun)) s: $(tail -n 40 "$log" | grep -aE '^ *(Downloading|Installing|Building|Collecting)' |
      tail -n 1 | sed -E 's/ collected packages.*//; s/-cp3.*whl|-py3.*whl//; s/^ *//')"
  done &
  beat=$!
  # shellcheck disable=SC2064  # this step's own, whatever `beat` is later
  trap "kill $beat 2>/dev/null || true" EXIT
  "$@" >>"$log" 2>&1 || status=$?
  kill "$beat" 2>/dev/null || true
  wait "$beat" 2>/dev/null || true
  trap - EXIT
  [ "$status" = 0 ] && say "  done in $((SECONDS - begun)) s"
  return "$status"
}
must() { # a step that cannot be done without
  step "$@" && return
  tail -n 15 "$log" >&2
  die "'$1' failed; the end of the log is above, all of it in $log" \
    "If the network or the disk ($(df -h --output=avail "$root" | tail -n 1 | tr -d ' ') free, 10G needed) was" \
    "the cause, run the same command again: it goes on where this one stopped."
}

# After a power cut or a kill some packages are there in part, and pip takes them for installed.
# This takes the metadata of those that we pinned away, so that pip installs them again, and prints
# their names.
forget_broken_packages() {
  is_ready || return 0
  "$venv/bin/python" - requirements.lock requirements-bench.lock requirements-docs.lock <<'PY'
import re
import shutil
import sys
import sysconfig
from importlib.metadata import Distribution
from pathlib import Path


def normal(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def is_whole(dist: Distribution) -> bool:
    try:
        return bool(dist.metadata["Name"] and dist.files) and all(
            file.size is None or file.locate().stat().st_size == file.size for file in dist.files
        )
    except OSError:
        return False


pinned = set()
for lock in sys.argv[1:]:
    lines = Path(lock).read_text().splitlines()
    pinned |= {normal(line.split("==")[0]) for line in lines if "==" in line}
for folder in Path(sysconfig.get_path("purelib")).glob("*.dist-info"):
    name = folder.name.removesuffix(".dist-info").rpartition("-")[0]
    if normal(name) in pinned and not is_whole(Distribution.at(folder)):
        shutil.rmtree(folder)
        print(name)
PY
}
mend() {
  local names
  names=$(forget_broken_packages)
  [ -z "$names" ] || say "installing again what was interrupted: ${names//$'\n'/ }"
}

# ---- the targets -----------------------------------------------------------------------------

# A stamp's name is a checksum of what the stage installs from, so a new lock makes it run again.
stamp() { echo "$state/$1.$({ cat "${@:2}" launch/setup.sh && "$venv/bin/python" -V; } | sha256sum | cut -c 1-16)"; }
stamped() { [ -e "$(stamp "$@")" ]; }
set_stamp() {
  rm -f "$state/$1".*
  rm -rf "$state/tmp"
  touch "$(stamp "$@")"
}

base() {
  local ffcv_files=("$shim/opencv4.pc" "$shim/include/opencv2/opencv.hpp")
  if [ -n "${PYTHON:-}" ]; then
    works "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.11 or 3.12 that runs."
  fi
  if ! is_ready || { [ "${FFCV:-}" != no ] && ! stamped ffcv "${ffcv_files[@]}"; }; then
    system_packages
  fi
  make_venv
  if ! stamped base requirements.lock pyproject.toml; then
    mend
    # shellcheck disable=SC2046  # a list of pins
    must "torch and its CUDA libraries, 3 GB to download" pip_install $(pins requirements.lock | grep -E "$first")
    # shellcheck disable=SC2046
    must "the other packages of requirements.lock" pip_install $(pins requirements.lock | grep -v '^ffcv==')
    must "this checkout, editable" pip_install --editable .
    set_stamp base requirements.lock pyproject.toml
  fi
  if [ "${FFCV:-}" = no ]; then
    say "FFCV=no: images are decoded by the slower torchvision loader"
  elif ! stamped ffcv "${ffcv_files[@]}"; then
    if step "FFCV, compiled here" build_ffcv; then
      set_stamp ffcv "${ffcv_files[@]}"
    else
      tail -n 15 "$log" >&2
      say "WARNING: FFCV could not be built (above; all of it in $log)."
      say "Going on without: images are decoded by the slower torchvision loader."
    fi
  fi
  check
}

system_packages() {
  local version=3.11 without=
  need has_python python3.11 python3.12
  has_python && version=$("$(find_python)" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  { has_python && has_ensurepip; } || need false "python$version-venv"
  if [ "${FFCV:-}" != no ]; then
    { has_python && has_headers; } || need false "python$version-dev"
    without="(Or without FFCV, on the slower torchvision loader: add FFCV=no.)"
    need has_compiler g++
    need has_pkg_config pkg-config pkgconf
    need has_turbojpeg libturbojpeg0-dev libturbojpeg-dev
    need has_opencv_core libopencv-core-dev
    need has_opencv_imgproc libopencv-imgproc-dev
    need has_tbb libtbb12
  fi
  install_missing "The set-up" "$without"
  has_python || die "No Python 3.11 or 3.12 found. Name one: make PYTHON=/path/to/python3.11"
}

build_ffcv() {
  # Its setup.py splits what pkg-config says at spaces, and the checkout's path may have some.
  local config status=0
  config=$(mktemp -d)
  cp -R "$shim/." "$config"
  # No cache: a wheel from there may be linked against another OpenCV. `import` proves the linking.
  { PKG_CONFIG_PATH=$config${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH} pip_install --no-cache-dir \
    --force-reinstall "$(pins requirements.lock | grep '^ffcv==')" && "$venv/bin/python" -c 'import ffcv'; } ||
    status=1
  rm -rf "$config"
  return $status
}

check() { # once for each new state of the environment
  stamped check requirements.lock pyproject.toml && return
  local complaints
  complaints=$(pip check | grep -vE "$known_gaps" || true)
  [ -z "$complaints" ] || say "WARNING: packages disagree:" "$complaints"
  set_stamp check requirements.lock pyproject.toml
}

bench() {
  stamped bench requirements-bench.lock && return
  mend
  must "the peers for benchmarks" pip_install -r requirements-bench.lock
  set_stamp bench requirements-bench.lock
}

docs() {
  stamped docs requirements-docs.lock && return
  mend
  must "Sphinx, for the documentation" pip_install -r requirements-docs.lock
  set_stamp docs requirements-docs.lock
}

browser() {
  [ "${BROWSER:-}" != no ] || return 0
  need has_chromium chromium
  install_missing "Opening reports in a browser" "(Or without the tests that do so: add BROWSER=no.)"
}

slurm() {
  [ "${SLURM:-}" != no ] || return 0
  need has_slurmctld slurmctld
  need has_slurmd slurmd
  need has_slurm_client slurm-client
  need has_munge munge
  need has_ip iproute2
  need has_faketime libfaketime # a test sets a run's clock off with it
  need has_promtool prometheus  # tests load launch/monitoring/ into it
  need has_zsh zsh              # tests press its keys, and fish's
  need has_fish fish
  install_missing "The tests with a real Slurm, Prometheus, shells and clock" "(Or without them: add SLURM=no.)"
}

[ "${BASH_SOURCE[0]}" = "$0" ] || return 0 # sourced by a test
[ $# -gt 0 ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 2; }
exec 9<"$root" # two makes at once: one installs, the other waits, where the file system can
flock 9 || true
for stage; do
  case $stage in
    base | bench | docs | browser | slurm)
      mkdir -p "$state"
      "$stage" 9>&-
      ;;
    *) die "unknown stage '$stage': base, bench, docs, browser or slurm" ;;
  esac
done
