#!/usr/bin/env bash
# Measures the representation on a CUDA device and prints one Markdown table: benchmarks/gpu.sh [OPTIONS]
# Needs torch with CUDA, Transformers, Pillow, Jinja, SciPy and threadpoolctl; PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
memory=/dev/shm
[ -w "$memory" ] || memory=${TMPDIR:-/tmp}
exec "${PYTHON:-python3}" -m benchmarks.gpu --device cuda --folder "$memory" "$@"
