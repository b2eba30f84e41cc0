package agentd_test

import (
	"io"
	"strings"
	"testing"

	"github.com/dayflyhq/dayfly/cmd/internal/agentd"
	"github.com/dayflyhq/dayfly/cmd/internal/config"
)

// TestOutgoingRefused: what is wrong with a proxy is said with its line and key.
func TestOutgoingRefused(t *testing.T) {
	for file, wants := range map[string][]string{
		`outgoing:
  - upstreams: []
  - listen: 192.0.2.1:1
    socket: /run/x
    mode: both
    upstreams:
      - {url: "http://x.example", credential: {audience: a}}
  - listen: 0.0.0.0:80
    open: true
    upstreams:
      - url: https://x.example
        ca_file: roots.pem
        on_revoke: no
        host: x
        credential: {audience: a b, binding: x5t}
  - socket: /run/y
    secret_file: /run/z
    mode: forward
    upstreams:
      - {url: "https://x.example", credential: {audience: a}}
      - {url: "https://x.example", credential: {audience: b}}
`: {":2: outgoing[0].listen: or socket", ":2: outgoing[0].upstreams: are 0", ":3: outgoing[1].listen: or socket", ":5: outgoing[1].mode", ":7: outgoing[1].upstreams[0].url: is http: a token would",
			":8: outgoing[2].listen: must be a loopback", ":12: outgoing[2].upstreams[0].ca_file", ":13: outgoing[2].upstreams[0].on_revoke", ":14: outgoing[2].upstreams[0].host", ":15: outgoing[2].upstreams[0].credential.audience", ":15: outgoing[2].upstreams[0].credential.binding: x5t needs spiffe_id",
			":17: outgoing[3].secret_file: and open are for TCP", ":21: outgoing[3].upstreams[1].path: is that of another"},
		"outgoing: [{listen: \"127.0.0.1:1\", upstreams: [{url: \"https://x\", credential: {audience: a}}]}]\n": {":1: outgoing[0].secret_file: or open: true must be there"},
	} {
		err := agentd.Run(t.Context(), []string{"--config", write(t, file)}, io.Discard, io.Discard)
		if code := config.ExitCode(err); code != 2 {
			t.Errorf("exit code %d, want 2", code)
		}
		for _, want := range wants {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("the error lacks %q:\n%v", want, err)
			}
		}
	}
}
