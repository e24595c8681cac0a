#!/bin/sh
# Start the Python runtime with the handler named by the first argument. Where no
# runtime API is offered (a plain container), the interface emulator serves one
# and answers invocations on port 8080.
set -eu
if [ $# -lt 1 ]; then
    echo "name a handler, for example: app.handler" >&2
    exit 64
fi
export _HANDLER="$1"
export LAMBDA_TASK_ROOT="${LAMBDA_TASK_ROOT:-/var/task}"
export LAMBDA_RUNTIME_DIR=/var/runtime
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$LAMBDA_TASK_ROOT:/opt/python:$LAMBDA_RUNTIME_DIR"
cd "$LAMBDA_TASK_ROOT"
if [ -n "${AWS_LAMBDA_RUNTIME_API:-}" ]; then
    exec /usr/bin/python3 -m awslambdaric "$1"
fi
exec /usr/local/bin/aws-lambda-rie /usr/bin/python3 -m awslambdaric "$1"
