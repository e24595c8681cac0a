// Calls a function server with messages made from their published field numbers: no code is generated.
//
//	grpc-client ADDRESS [CA CERTIFICATE KEY]
//
// Prints what it is answered, one line for each call; client.py prints the same.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
	"google.golang.org/protobuf/types/known/emptypb"
)

const (
	text    = descriptorpb.FieldDescriptorProto_TYPE_STRING
	integer = descriptorpb.FieldDescriptorProto_TYPE_INT64
	count   = descriptorpb.FieldDescriptorProto_TYPE_UINT32
)

type field struct {
	name   string
	number int32
	kind   descriptorpb.FieldDescriptorProto_Type
}

type fields map[string]any

func message(name string, all ...field) *descriptorpb.DescriptorProto {
	made := &descriptorpb.DescriptorProto{Name: proto.String(name)}
	for _, one := range all {
		made.Field = append(made.Field, &descriptorpb.FieldDescriptorProto{
			Name: proto.String(one.name), JsonName: proto.String(one.name), Number: proto.Int32(one.number),
			Type: one.kind.Enum(), Label: descriptorpb.FieldDescriptorProto_LABEL_OPTIONAL.Enum(),
		})
	}
	return made
}

func descriptors() protoreflect.MessageDescriptors {
	file, err := protodesc.NewFile(&descriptorpb.FileDescriptorProto{
		Name: proto.String("functionserver.proto"), Package: proto.String("functionserver"), Syntax: proto.String("proto3"),
		MessageType: []*descriptorpb.DescriptorProto{
			message("CreateRequest",
				field{"kernelImagePath", 4, text}, field{"kernelArgs", 5, text}, field{"imageName", 6, text},
				field{"imageStoragePrefix", 7, text}, field{"inetDev", 8, text}, field{"nameServer", 9, text},
				field{"awsAccessKeyID", 10, text}, field{"awsSecretAccessKey", 11, text}, field{"cpu", 13, integer},
				field{"mem", 14, integer}, field{"numReplica", 15, count}, field{"vmType", 16, text},
				field{"initrdPath", 17, text}),
			message("CreateReply", field{"ip", 1, text}, field{"vmid", 2, text}),
			message("ReleaseRequest", field{"vmid", 1, text}),
		},
	}, nil)
	if err != nil {
		fail(err)
	}
	return file.Messages()
}

func transport(files []string) credentials.TransportCredentials {
	if len(files) == 0 {
		return insecure.NewCredentials()
	}
	authority, err := os.ReadFile(files[0])
	if err != nil {
		fail(err)
	}
	pair, err := tls.LoadX509KeyPair(files[1], files[2])
	if err != nil {
		fail(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(authority)
	return credentials.NewTLS(&tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}})
}

// As the gRPC documents write them, which is how Python prints them.
func code(err error) string {
	switch status.Code(err) {
	case codes.InvalidArgument:
		return "INVALID_ARGUMENT"
	case codes.NotFound:
		return "NOT_FOUND"
	case codes.ResourceExhausted:
		return "RESOURCE_EXHAUSTED"
	case codes.Unavailable:
		return "UNAVAILABLE"
	}
	return strings.ToUpper(status.Code(err).String())
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

func main() {
	known := descriptors()
	connection, err := grpc.NewClient(os.Args[1], grpc.WithTransportCredentials(transport(os.Args[2:])))
	if err != nil {
		fail(err)
	}
	defer connection.Close()

	call := func(name, method string, request, reply proto.Message) bool {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		var trailer metadata.MD
		err := connection.Invoke(ctx, "/functionserver.Function/"+method, request, reply, grpc.Trailer(&trailer))
		if err != nil {
			after := "-"
			if told := trailer.Get("grpc-retry-pushback-ms"); len(told) > 0 {
				after = told[0]
			}
			fmt.Println(name, code(err), after, status.Convert(err).Message())
			return false
		}
		words := []any{name, "OK"}
		shape := reply.ProtoReflect().Descriptor().Fields()
		for i := range shape.Len() {
			words = append(words, reply.ProtoReflect().Get(shape.Get(i)))
		}
		fmt.Println(words...)
		return true
	}
	filled := func(name string, values fields) *dynamicpb.Message {
		shape := known.ByName(protoreflect.Name(name))
		made := dynamicpb.NewMessage(shape)
		for field, value := range values {
			made.Set(shape.Fields().ByName(protoreflect.Name(field)), protoreflect.ValueOf(value))
		}
		return made
	}
	create := func(more fields) string {
		request := filled("CreateRequest", fields{"kernelImagePath": "/a/vmlinux", "initrdPath": "/a/initrd", "mem": int64(128)})
		proto.Merge(request, filled("CreateRequest", more))
		reply := dynamicpb.NewMessage(known.ByName("CreateReply"))
		if !call("create", "CreateReplica", request, reply) {
			return ""
		}
		return reply.Get(known.ByName("CreateReply").Fields().ByName("vmid")).String()
	}
	release := func(vmid string) {
		call("release", "ReleaseVMSetup", filled("ReleaseRequest", fields{"vmid": vmid}), &emptypb.Empty{})
	}

	made := create(fields{
		"kernelArgs": "quiet --env=A=1", "imageName": "f/image:latest", "imageStoragePrefix": "/a/images", "inetDev": "eth9",
		"nameServer": "10.0.0.53", "awsAccessKeyID": "id", "awsSecretAccessKey": "secret", "cpu": int64(2),
		"numReplica": uint32(1), "vmType": "linux",
	})
	if made == "" {
		fail(fmt.Errorf("no replica"))
	}
	create(nil)
	release(made)
	release(made)
	create(fields{"awsAccessKeyID": "id"})
	create(fields{"awsSecretAccessKey": "secret"})
	create(fields{"numReplica": uint32(2)})
	create(fields{"vmType": "osv"})
	create(fields{"cpu": int64(-1)})
}
