package agent

import (
	"context"

	"github.com/dayflyhq/dayfly/sdk"
)

// Token is what both sockets answer from, for tests on a clock that real connections
// don't run on.
func (a *Agent) Token(ctx context.Context, r Request) (*sdk.Credential, error) {
	return a.cache.token(ctx, r)
}
