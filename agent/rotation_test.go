package agent_test

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"google.golang.org/grpc"
)

// patient lets calls take longer than the agent does: they are slow on a busy machine, and
// lost nowhere.
type patient struct{ grpc.ClientConnInterface }

func (p patient) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	return p.ClientConnInterface.Invoke(ctx, method, args, reply, opts...)
}

// The SVID rotates again and again while callers ask all the time, for what must be fetched
// each time and for exchanges that pass through: none is lost.
func TestRotationUnderLoad(t *testing.T) {
	noLeaks(t)
	const rotations, callers = 12, 8
	td := newDomain(t)
	b := newBroker(t, td)
	f := start(t, td, b, func(c *agent.Config) { c.Upstream = patient{c.Upstream} })
	f.ready()
	c := f.client()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var calls atomic.Int64
	var wg sync.WaitGroup
	loop := func(call func() error) {
		wg.Go(func() {
			for ctx.Err() == nil {
				calls.Add(1)
				if err := call(); err != nil && ctx.Err() == nil {
					t.Errorf("while the SVID rotates: %v", err)
					return
				}
			}
		})
	}
	web := f.web()
	for i := range callers {
		audience, asked := string(rune('a'+i)), 0
		loop(func() error { // each second one is fetched
			_, err := c.Issue(t.Context(), sdk.Request{Audience: audience, Scopes: []string{strconv.Itoa(asked / 2)}})
			asked++
			return err
		})
		loop(func() error {
			_, err := c.Exchange(t.Context(), token.NewSecret("subject"), sdk.Request{Audience: audience})
			return err
		})
	}
	loop(func() error {
		resp, err := web.Get("http://localhost/v1/token?audience=web")
		if err != nil {
			return err
		}
		if code, body, _ := answer(t, resp); code != http.StatusOK {
			t.Errorf("%d %v", code, body)
		}
		return nil
	})
	for range rotations {
		if err := td.Rotate(payments); err != nil {
			t.Fatal(err)
		}
		called, fetched := calls.Load(), b.issued.Load()
		eventually(t, "calls and fetches with this SVID", func() error {
			if calls.Load() < called+100 || b.issued.Load() < fetched+callers {
				return errors.New("not enough of them")
			}
			return nil
		})
	}
	cancel()
	wg.Wait()
	t.Logf("%d calls, %d fetches, %d streams", calls.Load(), b.issued.Load(), b.streams.Load())
}
