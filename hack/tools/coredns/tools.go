//go:build tools

// Package tools pins CoreDNS. It has a module of its own because it needs other
// versions of the Kubernetes libraries than Kubernetes does.
package tools

import _ "github.com/coredns/coredns"
