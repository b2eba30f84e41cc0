package agent_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/agent/deliver"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"google.golang.org/grpc/codes"
)

// A whole life with failures: nothing that the agent logs, serves to whoever watches it or
// answers with an error has a part of any credential that there was.
func TestNoCredentialIsShown(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	var mu sync.Mutex
	var secrets []string
	b.set(func(b *broker) {
		b.ttl = 12 * time.Second
		b.minted = func(secret string) {
			mu.Lock()
			defer mu.Unlock()
			secrets = append(secrets, secret)
		}
	})
	log, shown := &logbook{}, &bytes.Buffer{}
	var a *agent.Agent
	dir := tempDir(t)
	f := start(t, td, b, func(c *agent.Config) {
		c.Log = log.logger()
		c.Prefetch = []agent.Request{{Audience: "web"}}
		c.Files = []deliver.Target{
			{Path: dir + "/token", Files: []deliver.File{{Format: deliver.Token, Credentials: map[string]sdk.Request{"x": {Audience: "orders", TTL: 12 * time.Second}}}},
				Change: &deliver.Change{Command: []string{"/bin/false"}}},
		}
	}, func(got *agent.Agent) { a = got })
	look := func() {
		for _, path := range []string{"/readyz", "/healthz", "/v1/status", "/v1/token", "/v1/token?audience=a&audience=b", "/v1/token?binding=x", "/v2"} {
			resp, err := f.web().Get("http://localhost" + path)
			if err != nil {
				t.Fatal(err)
			}
			_, _ = io.Copy(shown, resp.Body)
			_ = resp.Body.Close()
		}
		for _, body := range []string{`{"subject_token":"` + newest(&mu, &secrets) + `","audience":"a"}`, newest(&mu, &secrets)} {
			resp, err := f.web().Post("http://localhost/v1/exchange", "application/json", strings.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			_, _ = io.Copy(shown, resp.Body)
			_ = resp.Body.Close()
		}
		_, err := f.client().Exchange(t.Context(), token.NewSecret(newest(&mu, &secrets)), sdk.Request{Audience: "denied"})
		fmt.Fprintln(shown, err, fmt.Sprintf("%+v %#v", err, a.Report()))
		if err := a.WriteMetrics(shown); err != nil {
			t.Fatal(err)
		}
	}
	f.ready()
	look()
	c := f.client()
	f.issue(c, sdk.Request{Audience: "asked"})
	at := b.revoke(revocation.Identity(payments))
	b.sent("a receipt", func(m *dayflyv1.FollowRequest) bool { return m.GetAcknowledge().GetPosition().GetSequence() >= at.Seq })
	look()
	f.ready()
	b.set(func(b *broker) { b.refuse = refusal(codes.PermissionDenied, "POLICY_DENIED", "no") })
	eventually(t, "the end of all", func() error {
		if code, body, _ := f.get("/readyz"); code != http.StatusServiceUnavailable {
			return fmt.Errorf("%v", body)
		}
		return nil
	})
	look()
	b.set(func(b *broker) { b.refuse = nil })
	f.ready()
	b.stop()
	look()
	f.stop()
	mu.Lock()
	defer mu.Unlock()
	if len(secrets) < 5 {
		t.Fatalf("only %d credentials", len(secrets))
	}
	if err := clean(secrets, log.String()+shown.String()); err != nil {
		t.Error(err)
	}
	if err := clean([]string{"eyJh.eyJj.c2ln"}, "x eyJj y"); err == nil {
		t.Error("this test finds nothing")
	}
	if !strings.Contains(log.String(), "still_valid") || !strings.Contains(log.String(), "telling of a change") {
		t.Errorf("the life had no failures:\n%s", log)
	}
}

func newest(mu *sync.Mutex, secrets *[]string) string {
	mu.Lock()
	defer mu.Unlock()
	return (*secrets)[len(*secrets)-1]
}

// clean looks for the claims and the signature of each credential; all have one header.
func clean(secrets []string, text string) error {
	for _, secret := range secrets {
		for _, part := range strings.Split(secret, ".")[1:] {
			if at := strings.Index(text, part); at >= 0 {
				return errors.New("a credential is shown: ..." + text[max(0, at-200):at])
			}
		}
	}
	return nil
}
