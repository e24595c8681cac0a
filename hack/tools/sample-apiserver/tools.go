//go:build tools

// Package tools pins the extension API server that conformance tests aggregate.
package tools

import _ "k8s.io/sample-apiserver"
