// Package oracle compares engine/vmi with KubeVirt's own code: its types, its webhook's rules and its defaults.
//
// It is a module of its own, for tests alone, so that none of KubeVirt's modules is one of the daemon's. Two modules
// that the webhook is compiled with but never calls are stood in for below stub, since not every proxy has them.
package oracle
