package main

import (
	"net/url"
	"strings"
	"testing"
)

// git.example.org and a registry on loopback are all that the fuzzed helpers know.
func knownServers(t testing.TB) servers {
	known, err := parseServers([]string{"git.example.org=git", "127.0.0.1:5000=local", "[::1]:80=six"}, "")
	if err != nil {
		t.Fatal(err)
	}
	return known
}

func TestServers(t *testing.T) {
	known := knownServers(t)
	for _, c := range []struct{ scheme, host, want string }{
		{"https", "git.example.org", "git"},
		{"https", "GIT.example.org:443", "git"},
		{"http", "127.0.0.1:5000", "local"},
		{"https", "127.0.0.1:5000", "local"},
		{"http", "[::1]", "six"},
		{"https", "git.example.org:8443", ""},
		{"https", "git.example.org.", ""},
		{"https", "xgit.example.org", ""},
		{"https", "git.example.org.evil.example", ""},
		{"https", "evil.example#git.example.org", ""},
		{"https", "evil.example?git.example.org", ""},
		{"https", "evil.example/git.example.org", ""},
		{"https", "user@git.example.org", ""},
		{"https", "git.example.org@evil.example", ""},
		{"https", "git.example.org:443:443", ""},
		{"https", "git.example.org\n", ""},
		{"https", "git%2eexample.org", ""},
		{"https", "", ""},
		{"http", "git.example.org", ""}, // port 80
		{"ssh", "git.example.org", ""},
		{"", "git.example.org", ""},
	} {
		if got, err := known.audience(c.scheme, c.host); got != c.want || err != nil {
			t.Errorf("%s://%q: %q, %v, want %q", c.scheme, c.host, got, err, c.want)
		}
	}
	if got, err := known.audience("http", "git.example.org:443"); got != "" || err == nil {
		t.Errorf("in the clear: %q, %v", got, err)
	}
}

func TestCalledAs(t *testing.T) {
	for program, want := range map[string]string{
		"/usr/bin/dayfly": "get", "git-credential-dayfly": "helper git get", "/opt/x/docker-credential-dayfly": "helper docker get", "dayfly-git": "get",
	} {
		if got := strings.Join(calledAs(program, []string{"get"}), " "); got != want {
			t.Errorf("%s: %q, want %q", program, got, want)
		}
	}
}

// gets checks that whoever is given an audience wrote the address of a server that is
// named, for it and nothing else.
func gets(t *testing.T, known servers, scheme, host string) {
	t.Helper()
	audience, err := known.audience(scheme, host)
	if err != nil || audience == "" {
		return
	}
	u, err := url.Parse(scheme + "://" + host + "/")
	if err != nil || u.User != nil || u.Path != "/" || u.RawQuery != "" || u.Fragment != "" {
		t.Fatalf("%q at %q, which is no host: %v", audience, host, err)
	}
	name := strings.ToLower(u.Hostname())
	want := map[string]string{"git": "git.example.org", "local": "127.0.0.1", "six": "::1"}[audience]
	if name != want || scheme != "https" && !(scheme == "http" && audience != "git") {
		t.Fatalf("%q went to %s by %s", audience, name, scheme)
	}
}

func FuzzHelperGit(f *testing.F) {
	f.Add([]byte("protocol=https\nhost=git.example.org\n\n"))
	f.Add([]byte("protocol=http\nhost=127.0.0.1:5000\nusername=x\n\nhost=y\n"))
	f.Add([]byte("host=git.example.org\r\n"))
	f.Add([]byte("host=\x00\nprotocol"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		asked, err := parseGit(raw)
		if err != nil {
			if sentence(err) != clean(sentence(err)) {
				t.Fatalf("%q", err)
			}
			return
		}
		for key, value := range asked { // all of it may be said back to git
			if key == "" || strings.ContainsAny(key+value, "\n\r\x00") {
				t.Fatalf("%q=%q", key, value)
			}
		}
		gets(t, knownServers(t), asked["protocol"], asked["host"])
	})
}

func FuzzHelperDocker(f *testing.F) {
	for _, seed := range []string{"git.example.org", "https://git.example.org/v2/", "http://127.0.0.1:5000", "https://git.example.org@evil.example", "://", "[::1]"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		scheme, host := dockerHost(raw)
		gets(t, knownServers(t), scheme, host)
	})
}

func FuzzHelperKubernetes(f *testing.F) {
	f.Add(`{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","spec":{"interactive":false,"cluster":{"server":"https://git.example.org"}}}`)
	f.Add(`{"apiVersion":"client.authentication.k8s.io/v1beta1","kind":"ExecCredential","spec":{}}`)
	f.Add(`{"kind":"ExecCredential","spec":{"cluster":null}}`)
	f.Add("{")
	f.Fuzz(func(t *testing.T, raw string) {
		info, err := parseExecInfo(raw)
		if err != nil {
			if sentence(err) != clean(sentence(err)) {
				t.Fatalf("%q", err)
			}
			return
		}
		audience, err := clusterAudience(info, []string{"git.example.org=git"})
		if (audience == "git") == (err != nil) {
			t.Fatalf("%q, %v", audience, err)
		}
		if audience != "" {
			u, err := url.Parse(info.Spec.Cluster.Server)
			if err != nil || u.Scheme != "https" || strings.ToLower(u.Hostname()) != "git.example.org" {
				t.Fatalf("%q for %q", audience, info.Spec.Cluster.Server)
			}
		}
	})
}
