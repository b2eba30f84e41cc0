package agentd

import (
	"strings"
	"testing"

	"github.com/dayflyhq/dayfly/cmd/internal/config"
)

// What is wrong with incoming and envoy is said with the key and its line.
func TestIncomingConfig(t *testing.T) {
	const good = `incoming: [{listen: "127.0.0.1:1", upstream: "http://127.0.0.1:2", audiences: [a], routes: [{path: /}]}]`
	for _, c := range []struct{ file, want string }{
		{good, ""},
		{strings.Replace(good, `"127.0.0.1:1"`, `"0.0.0.0:1"`, 1), ""},
		{strings.Replace(good, `"127.0.0.1:1"`, `"/run/x.sock", mode: "0660", group: "0", allowed_uids: [1]`, 1), ""},
		{strings.Replace(good, `"127.0.0.1:1"`, `"127.0.0.1:1", plain: true`, 1), ""},
		{strings.Replace(good, `"http://127.0.0.1:2"`, `"unix:///run/app.sock"`, 1), ""},
		{strings.Replace(good, `"http://127.0.0.1:2"`, `"https://localhost:2"`, 1), ""},
		{"incoming: [{}]", ":1: incoming[0].listen: is required"},
		{"incoming: [{}]", ":1: incoming[0].upstream: is required"},
		{"incoming: [{}]", ":1: incoming[0].routes: is required"},
		{strings.Replace(good, `"127.0.0.1:1"`, "x", 1), `incoming[0].listen: "x" is neither`},
		{strings.Replace(good, `"127.0.0.1:1"`, `"0.0.0.0:1", plain: true`, 1), "incoming[0].plain: needs a loopback address"},
		{strings.Replace(good, `"127.0.0.1:1"`, `"127.0.0.1:1", plain: true, anonymous: true`, 1), "incoming[0].anonymous: is for TLS"},
		{strings.Replace(good, `"127.0.0.1:1"`, `"/run/x.sock", plain: true`, 1), "incoming[0].plain: and anonymous are for TCP"},
		{strings.Replace(good, `"127.0.0.1:1"`, `"/run/x.sock", mode: "0666"`, 1), "incoming[0].listen: mode 0666 is wider"},
		{strings.Replace(good, `"127.0.0.1:1"`, `"127.0.0.1:1", mode: "0600"`, 1), "incoming[0].mode: group and the lists of who is allowed are for unix sockets"},
		{strings.Replace(good, `"127.0.0.1:1"`, `"/run/x.sock", group: no-such-group`, 1), "incoming[0].group: no group"},
		{strings.Replace(good, `"http://127.0.0.1:2"`, `"http://192.0.2.1:2"`, 1), "incoming[0].upstream: must be on this host"},
		{strings.Replace(good, `"http://127.0.0.1:2"`, `"http://127.0.0.1:2/x"`, 1), "incoming[0].upstream: has a path"},
		{strings.Replace(good, `"http://127.0.0.1:2"`, `"ftp://127.0.0.1:2"`, 1), "incoming[0].upstream: want http://"},
		{strings.Replace(good, `"http://127.0.0.1:2"`, `"https://127.0.0.1:2", upstream_ca: x`, 1), "incoming[0].upstream_ca: must be an absolute path"},
		{strings.Replace(good, "[a]", `["a b"]`, 1), "incoming[0].audiences: "},
		{strings.Replace(good, "[a]", "[a], max_staleness: 1ms", 1), "incoming[0].audiences: or max_staleness"},
		{strings.Replace(good, "[a]", "[a], on_stale: refuse", 1), "incoming[0].on_stale: is close or accept"},
		{strings.Replace(good, "{path: /}", "{path: /}, {path: /a, scopes: [\"a b\"]}", 1), `incoming[0].routes[1].scopes: "a b"`},
		{strings.Replace(good, "{path: /}", "{path: /, method: GET}", 1), "unknown key"},
		{strings.Replace(good, "{path: /}", "{path: /}, {path: /}", 1), "incoming[0].routes[1].path: is never reached"},
		{`envoy: [{listen: /run/e.sock, audiences: [a], routes: [{path: /}]}]`, ""},
		{`envoy: [{listen: "127.0.0.1:1", peer: principal, audiences: [a], routes: [{path: /}]}]`, ""},
		{`envoy: [{listen: "0.0.0.0:1", audiences: [a], routes: [{path: /}]}]`, "envoy[0].listen: must be the absolute path of a unix socket or a loopback address"},
		{`envoy: [{listen: /run/e.sock, peer: xfcc, audiences: [a], routes: [{path: /}]}]`, "envoy[0].peer: is certificate or principal"},
		{good + "\nfeed: {follow: false}", "incoming: and envoy need feed.follow"},
	} {
		cfg := defaults()
		err := config.Parse("agent.yaml", []byte(c.file), &cfg)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s\n%v\nwant %s", c.file, err, c.want)
		}
	}
}
