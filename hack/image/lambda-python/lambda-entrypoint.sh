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
if [ -n "${AWS_LAMBDA_RUNTIME_API:-}" ]; then
    exec /var/runtime/bootstrap
fi
exec /usr/local/bin/aws-lambda-rie /var/runtime/bootstrap
