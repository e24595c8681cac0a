//go:build tools

// Package tools pins metrics-server. It has a module of its own because it needs
// other versions of the Kubernetes libraries than Kubernetes does.
package tools

import _ "sigs.k8s.io/metrics-server/cmd/metrics-server"
