package agent

import (
	"context"
	"time"

	"github.com/dayflyhq/dayfly/agent/deliver"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/sdk"
)

// Token is what both sockets answer from, for tests on a clock that real connections
// don't run on.
func (a *Agent) Token(ctx context.Context, r Request) (*sdk.Credential, error) {
	return a.cache.token(ctx, r)
}

// NewAWSAuthorization is the authorization token file of a container endpoint.
func NewAWSAuthorization(path string, now func() time.Time) (rotate func() error, authorized func(string) bool) {
	s := &awsServer{cfg: &AWSContainer{TokenFile: deliver.Secret{Path: path}}, now: now}
	return s.rotate, s.authorized
}

// ParseUnit reads the address of systemd's end.
var ParseUnit = parseUnit

// RenewFrom and RenewTo are the window of renewal.
const RenewFrom, RenewTo = renewFrom, renewTo

// JudgeBy sets what is judged by in place of the feed, before Run.
func (a *Agent) JudgeBy(judge func(revocation.Subject) revocation.Verdict) { a.cache.judge = judge }

// Sweep is what the feed does once it has applied records.
func (a *Agent) Sweep(ctx context.Context) { a.cache.sweep(ctx) }
