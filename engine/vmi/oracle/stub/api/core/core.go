// Package core holds the names of virt-template's API that KubeVirt's webhook is compiled with.
package core

const (
	GroupName            = "template.kubevirt.io"
	SingularResourceName = "virtualmachinetemplate"
	PluralResourceName   = "virtualmachinetemplates"
)
