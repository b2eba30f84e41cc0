package e2e_test

import (
	"errors"
	"testing"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// must unwraps a result, or ends the test: must(f())(t).
func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func wantRefused(t *testing.T, box *sandbox.Sandbox, as spiffeid.ID, svc *sandbox.Service, c *sdk.Credential, reason verify.Reason) {
	t.Helper()
	_, err := box.Call(t.Context(), as, svc, c.Token)
	var refused *sandbox.Refused
	if !errors.As(err, &refused) || refused.Reason != string(reason) {
		t.Errorf("%s answered %v, want %s", svc.Audience, err, reason)
	}
}
