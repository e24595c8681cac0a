"""Calls a function server with code that grpcio-tools generates from functionserver.proto.

    client.py ADDRESS [CA CERTIFICATE KEY]

Prints what it is answered, one line for each call; hack/grpc-client/main.go prints the same.
"""

import os
import sys
import tempfile

import grpc
from grpc_tools import protoc


def generated():
    """The modules of messages and stubs, made on the spot."""
    here = os.path.dirname(os.path.abspath(__file__))
    included = os.path.join(os.path.dirname(protoc.__file__), "_proto")
    with tempfile.TemporaryDirectory() as out:
        made = protoc.main(
            ["protoc", f"-I{here}", f"-I{included}", f"--python_out={out}", f"--grpc_python_out={out}",
             "functionserver.proto"]
        )
        if made != 0:
            sys.exit("protoc failed")
        sys.path.insert(0, out)
        import functionserver_pb2
        import functionserver_pb2_grpc
    return functionserver_pb2, functionserver_pb2_grpc


def channel(address, files):
    if not files:
        return grpc.insecure_channel(address)
    ca, certificate, key = (open(file, "rb").read() for file in files)
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, certificate))


def main():
    messages, stubs = generated()
    function = stubs.FunctionStub(channel(sys.argv[1], sys.argv[2:]))

    def call(name, method, request):
        try:
            reply = method(request, timeout=30)
            print(name, "OK", *(getattr(reply, field.name) for field in reply.DESCRIPTOR.fields), flush=True)
            return reply
        except grpc.RpcError as error:
            after = dict(error.trailing_metadata() or ()).get("grpc-retry-pushback-ms", "-")
            print(name, error.code().name, after, error.details(), flush=True)

    def create(**fields):
        least = {"kernelImagePath": "/a/vmlinux", "initrdPath": "/a/initrd", "mem": 128}
        return call("create", function.CreateReplica, messages.CreateRequest(**{**least, **fields}))

    def release(vmid):
        call("release", function.ReleaseVMSetup, messages.ReleaseRequest(vmid=vmid))

    made = create(
        kernelArgs="quiet --env=A=1", imageName="f/image:latest", imageStoragePrefix="/a/images", inetDev="eth9",
        nameServer="10.0.0.53", awsAccessKeyID="id", awsSecretAccessKey="secret", cpu=2, numReplica=1, vmType="linux",
    )
    if made is None:
        sys.exit("no replica")
    create()
    release(made.vmid)
    release(made.vmid)
    create(awsAccessKeyID="id")
    create(awsSecretAccessKey="secret")
    create(numReplica=2)
    create(vmType="osv")
    create(cpu=-1)


main()
