#!/bin/sh
# `make dist`: a source distribution, a wheel from it alone, and the wheel tried in an environment that has nothing else.
# Usage: tests/packaging/run.sh PYTHON "TORCH REQUIREMENTS"
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
python=$1 torch=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$root"
"$root/.venv/bin/pip" install -qq --disable-pip-version-check build
echo "[1/4] source distribution"
rm -rf dist
"$root/.venv/bin/python" -m build --sdist --no-isolation --outdir dist . > "$work/sdist.log" 2>&1 || { cat "$work/sdist.log" >&2; exit 1; }
echo "[2/4] wheel, from the unpacked source distribution"
mkdir "$work/source"
tar -xzf dist/*.tar.gz -C "$work/source" --strip-components 1
# CMake and ninja are those of .venv, as in a build by pip.
(cd "$work/source" && "$root/.venv/bin/python" -m build --wheel --no-isolation --outdir "$root/dist" .) > "$work/wheel.log" 2>&1 ||
  { tail -n 60 "$work/wheel.log" >&2; exit 1; }
echo "[3/4] clean environment: $torch, the wheel, and what it asks for"
"$python" -m venv "$work/venv"
# The torch that it was built against, without the packages that only tests need.
"$work/venv/bin/pip" install -qq --disable-pip-version-check $torch dist/*.whl
echo "[4/4] the command line, from another folder"
cd "$work"
"$work/venv/bin/python" -I "$root/tests/packaging/check_installed.py"
ls -l "$root"/dist
