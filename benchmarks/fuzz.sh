#!/bin/sh
# A million random calls of the native kernels under AddressSanitizer and UBSan: ten times 100,000, each with a seed of
# its own, so that a part can be repeated. One value of each operation is compared with a plain loop.
# Usage: benchmarks/fuzz.sh [CALLS_OF_A_PART [FIRST_SEED [LAST_SEED]]]
set -eu
# To remember less of freed buffers, and of who asked for them, makes a call faster.
export ASAN_OPTIONS="${ASAN_OPTIONS:-quarantine_size_mb=16:malloc_context_size=4}"
root=$(cd "$(dirname "$0")/.." && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
cmake -S "$root" -B "$build" -DEPSANET_FUZZ=ON > /dev/null
cmake --build "$build" --parallel 2 > /dev/null
for seed in $(seq "${2:-1}" "${3:-10}"); do
    printf 'seed %s: ' "$seed"
    "$build/fuzz" "${1:-100000}" "$seed"
done
