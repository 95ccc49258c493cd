package oracle

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"reflect"
	"regexp"
	"strings"

	extv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	k8sfield "k8s.io/apimachinery/pkg/util/validation/field"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/tools/cache"
	kv "kubevirt.io/api/core/v1"
	"kubevirt.io/kubevirt/pkg/defaults"
	netadmitter "kubevirt.io/kubevirt/pkg/network/admitter"
	"kubevirt.io/kubevirt/pkg/virt-api/webhooks/validating-webhook/admitters"
	virtconfig "kubevirt.io/kubevirt/pkg/virt-config"
	"sigs.k8s.io/yaml"
)

// machine is a document as KubeVirt reads it: where its spec stands, and the spec.
type machine struct {
	kind string
	path *k8sfield.Path
	vmi  *kv.VirtualMachineInstance
}

// file is what KubeVirt reads in a file.
type file struct {
	machines []machine
	cluster  *kv.KubeVirt
}

// read reads the documents of a file with KubeVirt's types. The guide's kind: VM with its spec at the top is a VMI.
func read(data []byte) (file, error) {
	var f file
	docs := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(data)))
	for {
		doc, err := docs.Read()
		if err == io.EOF {
			return f, nil
		}
		if err != nil {
			return f, err
		}
		var head struct {
			Kind string `json:"kind"`
			Spec struct {
				Template *struct{} `json:"template"`
			} `json:"spec"`
		}
		if err := yaml.Unmarshal(doc, &head); err != nil {
			return f, err
		}
		switch kind := head.Kind; {
		case kind == "KubeVirt" || kind == "Kubevirt":
			f.cluster = &kv.KubeVirt{}
			err = yaml.Unmarshal(doc, f.cluster)
		case (kind == "VirtualMachine" || kind == "VM") && head.Spec.Template != nil:
			vm := &kv.VirtualMachine{}
			if err = yaml.Unmarshal(doc, vm); err == nil {
				f.machines = append(f.machines, machine{kind, k8sfield.NewPath("spec", "template", "spec"),
					&kv.VirtualMachineInstance{ObjectMeta: vm.Spec.Template.ObjectMeta, Spec: vm.Spec.Template.Spec}})
			}
		case kind == "VirtualMachineInstance" || kind == "VMI" || kind == "VM" || kind == "VirtualMachine":
			m := machine{kind, k8sfield.NewPath("spec"), &kv.VirtualMachineInstance{}}
			if err = yaml.Unmarshal(doc, m.vmi); err == nil {
				f.machines = append(f.machines, m)
			}
		}
		if err != nil {
			return f, err
		}
	}
}

// config is the cluster's configuration, KubeVirt's defaults where the file has none.
func (f *file) config() *virtconfig.ClusterConfig {
	cr := f.cluster
	if cr == nil {
		cr = &kv.KubeVirt{}
	}
	cr = cr.DeepCopy()
	cr.Name, cr.Namespace, cr.ResourceVersion = "kubevirt", "kubevirt", "1"
	cr.Status.Phase, cr.Status.DefaultArchitecture = kv.KubeVirtPhaseDeployed, "amd64"
	crds := cache.NewSharedIndexInformer(&cache.ListWatch{}, &extv1.CustomResourceDefinition{}, 0, cache.Indexers{})
	crs := cache.NewSharedIndexInformer(&cache.ListWatch{}, &kv.KubeVirt{}, 0, cache.Indexers{})
	if err := crs.GetStore().Add(cr); err != nil {
		panic(err)
	}
	c, err := virtconfig.NewClusterConfigWithCPUArch(crds, crs, "kubevirt", "amd64")
	if err != nil {
		panic(err)
	}
	return c
}

// webhook asks KubeVirt's webhook about a machine: first its defaults are set, then it is validated. The webhook for
// VMIs asks the network's rules twice, before all others and among them; once is enough here.
func webhook(m machine, config *virtconfig.ClusterConfig) []metav1.StatusCause {
	vmi := m.vmi.DeepCopy()
	if err := defaults.SetDefaultVirtualMachineInstance(config, vmi); err != nil {
		return []metav1.StatusCause{{Type: metav1.CauseTypeFieldValueInvalid, Message: err.Error(),
			Field: m.path.Child("domain", "devices", "interfaces").String()}}
	}
	first := netadmitter.ValidateCreation(m.path, &vmi.Spec, config)
	network := netadmitter.NewValidator(m.path, &vmi.Spec, config).Validate()
	all := admitters.ValidateVirtualMachineInstanceSpec(m.path, &vmi.Spec, config)
	if m.path.String() != "spec" {
		return append(first, all...)
	}
	return append(append(first, network...), without(all, network)...)
}

// without is all less the run of causes in it; the order of overlapping port ranges, which KubeVirt leaves to chance,
// does not matter to it.
func without(all, run []metav1.StatusCause) []metav1.StatusCause {
	sorted := func(c []metav1.StatusCause) []metav1.StatusCause {
		return overlapsInOrder(append([]metav1.StatusCause(nil), c...))
	}
	for i := 0; i+len(run) <= len(all); i++ {
		if reflect.DeepEqual(sorted(all[i:i+len(run)]), sorted(run)) {
			return append(append([]metav1.StatusCause(nil), all[:i]...), all[i+len(run):]...)
		}
	}
	panic("the webhook did not ask the network's rules")
}

// overlapsInOrder puts TCP before UDP.
func overlapsInOrder(c []metav1.StatusCause) []metav1.StatusCause {
	is := func(x metav1.StatusCause, protocol string) bool {
		return strings.HasPrefix(x.Message, protocol+" portRanges [")
	}
	for swapped := true; swapped; {
		swapped = false
		for i := 1; i < len(c); i++ {
			if is(c[i-1], "UDP") && is(c[i], "TCP") && c[i].Field == c[i-1].Field {
				c[i-1], c[i], swapped = c[i], c[i-1], true
			}
		}
	}
	return c
}

// inScope are the fields of the webhook's causes that engine/vmi knows about.
var inScope = regexp.MustCompile(`^(spec(\.template\.spec)?(\[\d+\]\.bootOrder|\.hostname|\.subdomain|\.architecture|` +
	`\.interfaces|\.networks.*|\.resourceClaims.*|\.launchSecurity|\.(readiness|liveness)Probe.*|\.dns(Policy|Config)|` +
	`\.domain\.devices\.interfaces.*|\.domain\.devices\.disks\[\d+\]\.bootOrder)?|nameservers|searchDomains|options)$`)

// lines writes causes as the golden files have them.
func lines(causes []metav1.StatusCause) []string {
	out := []string{}
	for _, c := range overlapsInOrder(causes) {
		if inScope.MatchString(c.Field) && !strings.HasPrefix(c.Message, "unsupported architecture") {
			out = append(out, fmt.Sprintf("%s %s: %s", c.Type, c.Field, c.Message))
		}
	}
	return out
}
