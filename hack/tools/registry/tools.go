//go:build tools

// Package tools pins the image registry that pull tests talk to.
package tools

import _ "github.com/distribution/distribution/v3/cmd/registry"
