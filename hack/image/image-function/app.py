"""A function that comes as an image; nothing of it lies where a client mounts volumes."""

import os


def handler(event, context):
    return {"from": "image", "event": event, "function": os.environ.get("AWS_LAMBDA_FUNCTION_NAME")}
