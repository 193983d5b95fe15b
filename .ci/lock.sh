#!/bin/sh
# Writes the lock files: every version, with hashes, for every platform, naming no index.
# `requirements.lock` runs the product; `-dev` adds tools and the parity tests' Python parts; `-torch` is
# PyTorch with the CUDA libraries that its general Linux build is linked with. `-torch-cpu`, written by
# hand, is the build without them; its version ends in `+cpu`, so no other file can stand in for it.
set -eu
cd "$(dirname "$0")/.."
all=$(mktemp)
compile() {
    uv pip compile pyproject.toml --universal --python-version 3.11 --no-emit-index-url \
        --no-annotate --no-header --quiet "$@"
}
names() { sed -nE 's/^([A-Za-z0-9._-]+)==.*/\1/p' "$1" | sort -u; }

compile --extra build --extra dev --extra parity -o "$all"
compile --extra build --generate-hashes -c "$all" -o requirements.lock

cuda='^(cuda-|nvidia-|triton)'
skip=$(names requirements.lock; echo torch; names "$all" | grep -E "$cuda")
compile --extra build --extra dev --extra parity --generate-hashes -c "$all" \
    $(for name in $skip; do printf -- '--no-emit-package %s ' "$name"; done) -o requirements-dev.lock

skip=$(names "$all" | grep -vE "$cuda|^torch$")
compile --extra parity --generate-hashes -c "$all" \
    $(for name in $skip; do printf -- '--no-emit-package %s ' "$name"; done) -o requirements-torch.lock
rm "$all"
