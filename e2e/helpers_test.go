package e2e_test

import (
	"errors"
	"testing"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
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

// wantError checks a refusal of the broker: its code, its reason, and that it has words.
func wantError(t *testing.T, err error, code codes.Code, reason string) *sdk.Error {
	t.Helper()
	var e *sdk.Error
	if !errors.As(sdk.FromRPC(err), &e) || e.Code != code || e.Reason != reason || e.Message == "" || e.Hint == "" {
		t.Fatalf("got %v, want %s %s with a message and a hint", err, code, reason)
	}
	return e
}

func wantRefused(t *testing.T, box *sandbox.Sandbox, as spiffeid.ID, svc *sandbox.Service, c *sdk.Credential, reason verify.Reason) {
	t.Helper()
	_, err := box.Call(t.Context(), as, svc, c.Token)
	var refused *sandbox.Refused
	if !errors.As(err, &refused) || refused.Reason != string(reason) {
		t.Errorf("%s answered %v, want %s", svc.Audience, err, reason)
	}
}
