package agent

import (
	"context"
	"errors"
	"time"

	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

// noIdentity is the reason of a call that could not be made for want of an SVID.
const noIdentity = "IDENTITY_UNAVAILABLE"

// proven is a connection that is used only while there is an SVID: one that was made with
// an SVID that the Workload API has taken back would still stand. A call waits for the SVID
// as it would for the broker.
type proven struct {
	grpc.ClientConnInterface
	source  Source
	changed func() <-chan struct{}
}

func (p proven) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	if err := p.await(ctx); err != nil {
		return err
	}
	return p.ClientConnInterface.Invoke(ctx, method, args, reply, opts...)
}

func (p proven) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	if err := p.await(ctx); err != nil {
		return nil, err
	}
	return p.ClientConnInterface.NewStream(ctx, desc, method, opts...)
}

func (p proven) await(ctx context.Context) error {
	for {
		changed := p.changed() // before it is looked at
		_, err := p.source.GetX509SVID()
		if err == nil {
			return nil
		}
		select {
		case <-changed:
		case <-time.After(maxIdentityPause): // a source that tells of no change
		case <-ctx.Done():
			return sdk.FromRPC(unproven(err))
		}
	}
}

func unproven(err error) error {
	return refuse(codes.Unavailable, "IDENTITY_UNAVAILABLE", err.Error(), "see that the Workload API has a registration for this workload; the agent keeps asking")
}

// notIssued refuses callers at once while the Workload API says that there is no SVID for
// this workload. Before it has answered, they wait.
func notIssued(source x509svid.Source) error {
	_, err := source.GetX509SVID()
	if err == nil {
		return nil
	}
	if missing := (*NotIssuedError)(nil); errors.As(err, &missing) {
		return unproven(err)
	}
	return nil
}

// disowned reports whether claims are of an identity that is known not to be this
// workload's now. Before the Workload API has answered nothing is known.
func disowned(svid *x509svid.SVID, err error, claims *token.Claims) bool {
	if err != nil {
		var missing *NotIssuedError
		return errors.As(err, &missing)
	}
	return svid.ID != claims.Presenter()
}
