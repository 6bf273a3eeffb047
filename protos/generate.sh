#!/bin/sh
# Regenerates the committed stubs. The .proto path is the import path: protoc -Iprotos.
set -eu
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
"$python" -m grpc_tools.protoc -Iprotos --python_out=protos --pyi_out=protos \
    protos/shoal_protos/v1/*.proto protos/shoal_protos/oip/*.proto
"$python" -m grpc_tools.protoc -Iprotos --grpc_python_out=protos \
    protos/shoal_protos/v1/agents.proto protos/shoal_protos/v1/blobs.proto protos/shoal_protos/v1/enrolment.proto
