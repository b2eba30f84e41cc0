package wire_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/wire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"
)

func use(t testing.TB) *dayflyv1.Use {
	seen := timestamppb.New(time.Unix(1_700_000_000, 0))
	return &dayflyv1.Use{
		Grant: member(t).Grant.String(), PeerIdentity: payments.String(), PeerAddress: "2001:db8::1%eth0",
		Accepted: true, Count: 1, FirstSeen: seen, LastSeen: seen, Head: 7, Era: "3f9c1a7e", Fingerprint: make([]byte, 32),
	}
}

func TestCheckUse(t *testing.T) {
	if err := wire.CheckUse(use(t)); err != nil {
		t.Fatal(err)
	}
	bare := use(t)
	bare.PeerIdentity, bare.PeerAddress, bare.Era, bare.Fingerprint = "", "", "", nil
	bare.Accepted, bare.RefusalReason = false, "TOKEN_REVOKED"
	if err := wire.CheckUse(bare); err != nil {
		t.Errorf("from an older verifier: %v", err)
	}
	for name, change := range map[string]func(*dayflyv1.Use){
		"no grant":                  func(u *dayflyv1.Use) { u.Grant = "" },
		"a grant of another form":   func(u *dayflyv1.Use) { u.Grant += "A" },
		"a peer that is none":       func(u *dayflyv1.Use) { u.PeerIdentity = "payments" },
		"a peer of bad UTF-8":       func(u *dayflyv1.Use) { u.PeerIdentity = "spiffe://example.org/\xff" },
		"a long address":            func(u *dayflyv1.Use) { u.PeerAddress = strings.Repeat("1", 65) },
		"an address of bad UTF-8":   func(u *dayflyv1.Use) { u.PeerAddress = "\xff" },
		"an address with an escape": func(u *dayflyv1.Use) { u.PeerAddress = "\x1b[2J" },
		"accepted for a reason":     func(u *dayflyv1.Use) { u.RefusalReason = "X" },
		"refused without a reason":  func(u *dayflyv1.Use) { u.Accepted = false },
		"a long reason":             func(u *dayflyv1.Use) { u.Accepted, u.RefusalReason = false, strings.Repeat("R", 65) },
		"no count":                  func(u *dayflyv1.Use) { u.Count = 0 },
		"a count of all":            func(u *dayflyv1.Use) { u.Count = 1 << 63 },
		"a long peer":               func(u *dayflyv1.Use) { u.PeerIdentity = "spiffe://example.org/" + strings.Repeat("p", 2048) },
		"no time":                   func(u *dayflyv1.Use) { u.FirstSeen = nil },
		"a time of no year":         func(u *dayflyv1.Use) { u.LastSeen = &timestamppb.Timestamp{Seconds: 1 << 60} },
		"ended before it began":     func(u *dayflyv1.Use) { u.LastSeen = timestamppb.New(time.Unix(1, 0)) },
		"a short fingerprint":       func(u *dayflyv1.Use) { u.Fingerprint = []byte{1} },
		"a key that is none":        func(u *dayflyv1.Use) { u.KeyId = "key" },
		"a verifier that is none":   func(u *dayflyv1.Use) { u.VerifierIdentity = "ledger" },
		"an instance with a path":   func(u *dayflyv1.Use) { u.VerifierInstance = "instance/1" },
		"an era that is none":       func(u *dayflyv1.Use) { u.Era = "0" },
	} {
		u := use(t)
		change(u)
		if err := wire.CheckUse(u); !errors.Is(err, feed.ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzUse: whatever a stranger sends is kept as it is or refused, and never a panic.
func FuzzUse(f *testing.F) {
	b, err := proto.Marshal(use(f))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		var m dayflyv1.Use
		if proto.Unmarshal(b, &m) != nil || wire.CheckUse(&m) != nil {
			return
		}
		if _, err := m.GetLastSeen().AsTime().MarshalJSON(); err != nil || proto.Size(&m) > 4<<10 {
			t.Errorf("it can't be kept: %v, %d bytes", err, proto.Size(&m))
		}
	})
}

// Whatever is lost, broken off and begun anew, and whenever: each use that went in has
// arrived once, or is held, or was counted as dropped; and what is held is bounded.
func TestOutbox(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var o wire.Outbox
		var put, arrived uint64
		var pings []string
		last := uint64(0) // the receiver's: the highest number it took
		nonce := 0
		take := func(m *dayflyv1.UseReport) {
			if m.GetNumber() > last+1 {
				t.Fatalf("report %d after %d", m.GetNumber(), last)
			}
			if n := len(m.GetUses()); n > wire.MaxUses || proto.Size(m) > wire.MaxReportBytes+64 {
				t.Fatalf("a report of %d uses and %d bytes", n, proto.Size(m))
			}
			if m.GetNumber() <= last {
				return
			}
			last = m.GetNumber()
			arrived += m.GetDropped()
			for _, u := range m.GetUses() {
				arrived += u.GetCount()
			}
		}
		lossy := false // this stream is broken and doesn't know it yet
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			switch rapid.SampledFrom([]string{"put", "put", "send", "send", "ping", "answer", "break", "reconnect"}).Draw(t, "step") {
			case "put":
				if o.Full() {
					continue
				}
				n := rapid.IntRange(0, 600).Draw(t, "uses")
				dropped := rapid.Uint64Range(0, 2).Draw(t, "dropped")
				o.Put(slices.Repeat([]*dayflyv1.Use{{Count: 2, PeerIdentity: strings.Repeat("x", rapid.IntRange(0, 200).Draw(t, "size"))}}, n), dropped)
				put += 2*uint64(n) + dropped
			case "send":
				for m := o.Next(); m != nil; m = o.Next() {
					if !lossy {
						take(m)
					}
				}
			case "ping":
				nonce++
				o.Pinged(fmt.Sprint(nonce))
				if !lossy {
					pings = append(pings, fmt.Sprint(nonce))
				}
			case "answer":
				if len(pings) > 0 {
					o.Answered(pings[0])
					pings = pings[1:]
				}
			case "break":
				lossy = true
			case "reconnect":
				o.Reconnected()
				lossy, pings = false, nil
			}
		}
		o.Reconnected()
		held := 0
		for m := o.Next(); m != nil; m = o.Next() {
			take(m)
			held++
		}
		if arrived != put {
			t.Fatalf("%d went in and %d arrived", put, arrived)
		}
		if held > 64+3+1 {
			t.Fatalf("%d reports are held", held)
		}
		o.Pinged("last")
		o.Answered("last")
		o.Reconnected()
		if m := o.Next(); m != nil {
			t.Fatalf("report %d is held after it was answered for", m.GetNumber())
		}
	})
}
