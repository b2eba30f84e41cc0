package wire_test

import (
	"testing"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/wire"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// A credential that was issued at the end of a second, whose beginning its times say, has
// a second less.
func TestLife(t *testing.T) {
	issued := time.Unix(1_700_000_000, 0)
	for life, want := range map[time.Duration]time.Duration{
		5 * time.Minute: 299 * time.Second, 10 * time.Second: 9 * time.Second, time.Second: 900 * time.Millisecond,
	} {
		if got := wire.Life(&dayflyv1.Credential{IssuedAt: timestamppb.New(issued), ExpiresAt: timestamppb.New(issued.Add(life))}); got != want {
			t.Errorf("of %v: %v, want %v", life, got, want)
		}
	}
}
