#!/bin/sh
# Regenerates the committed stubs; with --check it only compares them.
# The .proto path is the import path: protoc -Iprotos.
set -eu
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
out=protos
if [ "${1:-}" = --check ]; then
    out=$(mktemp -d)
    trap 'rm -rf "$out"' EXIT
fi
"$python" -m grpc_tools.protoc -Iprotos --python_out="$out" --pyi_out="$out" \
    protos/shoal_protos/v1/*.proto protos/shoal_protos/oip/*.proto
"$python" -m grpc_tools.protoc -Iprotos --grpc_python_out="$out" \
    protos/shoal_protos/v1/agents.proto protos/shoal_protos/v1/blobs.proto protos/shoal_protos/v1/enrolment.proto
[ "$out" = protos ] && exit 0
for stub in $(cd "$out" && find . -name '*_pb2*.py*'); do
    cmp -s "$out/$stub" "protos/$stub" || {
        echo "protos/$stub is stale: run 'make protos' and commit the result." >&2
        exit 1
    }
done
