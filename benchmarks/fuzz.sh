#!/bin/sh
# A million random calls of the native kernels under AddressSanitizer and UBSan: about an hour on one core.
# Usage: benchmarks/fuzz.sh [CALLS [SEED]]
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
cmake -S "$root" -B "$build" -DEPSANET_FUZZ=ON > /dev/null
cmake --build "$build" --parallel 2 > /dev/null
"$build/fuzz" "${1:-1000000}" "${2:-1}"
