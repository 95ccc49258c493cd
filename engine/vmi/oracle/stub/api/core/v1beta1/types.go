// Package v1beta1 holds the one type of virt-template's API that KubeVirt's webhook is compiled with.
package v1beta1

import "k8s.io/apimachinery/pkg/runtime"

// VirtualMachineTemplate is never made.
type VirtualMachineTemplate struct{ runtime.Unknown }
