package supervise

import (
	"context"
	"crypto/rand"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// scripted is an agent that gives each audience one credential, and ends its first stream.
type scripted struct {
	dayflyv1.UnimplementedWatchServiceServer
	asked chan *dayflyv1.WatchRequest
}

func (s scripted) Watch(m *dayflyv1.WatchRequest, stream grpc.ServerStreamingServer[dayflyv1.WatchResponse]) error {
	select {
	case s.asked <- m:
	default:
	}
	out := &dayflyv1.WatchResponse{}
	for _, one := range m.GetWanted() {
		out.Watched = append(out.Watched, &dayflyv1.Watched{Credential: &dayflyv1.Credential{
			Token: strings.Repeat("t", token.MaxBytes), Grant: rand.Text(), Audience: one.GetAudience(),
			IssuedAt: timestamppb.Now(), ExpiresAt: timestamppb.New(time.Now().Add(time.Minute)),
		}})
	}
	if err := stream.Send(out); err != nil {
		return err
	}
	if len(m.GetHeld()) == 0 {
		return nil // it is restarted
	}
	<-stream.Context().Done()
	return nil
}

// As much as may be held is brought along to an agent that was restarted, and what is held is
// aged by a clock that nobody sets.
func TestWatcherHoldsMuch(t *testing.T) {
	at := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", at)
	if err != nil {
		t.Fatal(err)
	}
	s := scripted{asked: make(chan *dayflyv1.WatchRequest, 8)}
	server := grpc.NewServer(grpc.MaxRecvMsgSize(1 << 20))
	dayflyv1.RegisterWatchServiceServer(server, s)
	go func() { _ = server.Serve(l) }()
	defer server.Stop()
	client, err := sdk.New(sdk.Config{Address: "unix://" + at})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	var wanted []sdk.Request
	for i := range maxWanted {
		wanted = append(wanted, sdk.Request{Audience: fmt.Sprint("a", i)})
	}
	w := NewWatcher(client.Conn(), wanted)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); w.Run(ctx) }()
	defer func() { cancel(); <-done }()
	for range 2 {
		select {
		case m := <-s.asked:
			if n := len(m.GetHeld()); n != 0 && n != maxWanted {
				t.Errorf("%d are brought along", n)
			}
		case <-time.After(30 * time.Second):
			t.Fatalf("nobody asks: %s", w.Trouble())
		}
	}
	for c := w.Newest(wanted[0]); ; c = w.Newest(wanted[0]) {
		if c != nil {
			if c.Expires == c.Expires.Round(0) {
				t.Error("it has no monotonic time")
			}
			return
		}
		<-w.Changed()
	}
}
