// Package virttemplate holds the one function of virt-template's client that KubeVirt's webhook is compiled with.
package virttemplate

import (
	"errors"

	"k8s.io/client-go/rest"
)

// Client is never made.
type Client struct{}

// NewForConfig is never called.
func NewForConfig(*rest.Config) (*Client, error) { return nil, errors.New("not here") }

// TemplateV1beta1 is never called.
func (*Client) TemplateV1beta1() *Client { return nil }

// RESTClient is never called.
func (*Client) RESTClient() rest.Interface { return nil }
