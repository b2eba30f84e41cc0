package clients_test

import (
	"os"
	"strings"
	"testing"

	bootstrap "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	authz "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_authz/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
	"sigs.k8s.io/yaml"
)

// TestEnvoyPage: the configuration of docs/agent/envoy.md is one to Envoy's own types, with
// their own rules, down to what is in an Any; and no answer of the agent's is a no.
func TestEnvoyPage(t *testing.T) {
	page := string(must(os.ReadFile("../../docs/agent/envoy.md"))(t))
	_, rest, found := strings.Cut(page, "envoy.yaml <<END\n")
	text, _, ended := strings.Cut(rest, "    END\n")
	if !found || !ended {
		t.Fatal("the page has no envoy.yaml")
	}
	var config strings.Builder
	for line := range strings.Lines(text) {
		config.WriteString(strings.TrimPrefix(line, "    "))
	}
	b := new(bootstrap.Bootstrap)
	if err := protojson.Unmarshal(must(yaml.YAMLToJSON([]byte(config.String())))(t), b); err != nil {
		t.Fatal(err)
	}
	seen := map[string]proto.Message{}
	validate(t, b, seen)
	filter, _ := seen["envoy.extensions.filters.http.ext_authz.v3.ExtAuthz"].(*authz.ExtAuthz)
	if filter == nil || filter.GetFailureModeAllow() || !filter.GetIncludePeerCertificate() || filter.GetClearRouteCache() {
		t.Errorf("ext_authz: %v", filter)
	}
	manager, _ := seen["envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"].(*hcm.HttpConnectionManager)
	if !manager.GetNormalizePath().GetValue() || manager.GetPathWithEscapedSlashesAction() != hcm.HttpConnectionManager_REJECT_REQUEST {
		t.Errorf("paths: %v", manager)
	}
}

// validate checks a message and all that is in it, and notes what Anys hold.
func validate(t *testing.T, m proto.Message, seen map[string]proto.Message) {
	t.Helper()
	if v, ok := m.(interface{ ValidateAll() error }); ok {
		if err := v.ValidateAll(); err != nil {
			t.Error(err)
		}
	}
	if a, ok := m.(*anypb.Any); ok {
		inner := must(a.UnmarshalNew())(t)
		seen[string(inner.ProtoReflect().Descriptor().FullName())] = inner
		validate(t, inner, seen)
		return
	}
	m.ProtoReflect().Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.IsMap():
			if f.MapValue().Message() != nil {
				v.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool {
					validate(t, v.Message().Interface(), seen)
					return true
				})
			}
		case f.Message() == nil:
		case f.IsList():
			for i := range v.List().Len() {
				validate(t, v.List().Get(i).Message().Interface(), seen)
			}
		default:
			validate(t, v.Message().Interface(), seen)
		}
		return true
	})
}
