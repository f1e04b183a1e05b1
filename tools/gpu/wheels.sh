#!/usr/bin/env bash
# Fetches the wheels that a machine with torch, but without a package registry, lacks:
#   tools/gpu/wheels.sh FOLDER 3.12 webdataset open_clip_torch ftfy hjson pydantic ...
# There: python -m pip install --no-index --no-deps --target SITE FOLDER/*.whl, and SITE first in PYTHONPATH.
# The versions are those of the environment that runs this; deepspeed is built as pure Python.
set -euo pipefail
[ $# -ge 3 ] || { sed -n 2,3p "$0" >&2; exit 2; }
folder=$1 version=$2
shift 2
platforms=()
for platform in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${platform}_x86_64")
done
for name in "$@"; do
  pinned=$(python -c 'import sys; from importlib.metadata import version; print(version(sys.argv[1]))' "$name")
  if [ "$name" = deepspeed ]; then
    python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$folder" "deepspeed==$pinned"
  else
    python -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" \
      --implementation cp "${platforms[@]}" --dest "$folder" "$name==$pinned"
  fi
done
ls "$folder"
