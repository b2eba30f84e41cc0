package wire

import (
	"crypto/sha256"
	"strings"
	"sync"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// Limits of use reports.
const (
	// MaxUses bounds the entries of one report.
	MaxUses = 256
	// MaxReportBytes keeps a report well below the 64 KiB of a request.
	MaxReportBytes = 32 << 10
	// MaxAddressBytes and MaxReasonBytes bound what an entry says of its peer and of a
	// refusal.
	MaxAddressBytes = 64
	MaxReasonBytes  = 64
	// maxIdentityBytes is the largest SPIFFE ID that the standard wants supported.
	maxIdentityBytes = 2048
	// maxCount keeps sums of counts from overflowing.
	maxCount = 1 << 40
)

// CheckUse returns why an entry of a use report can't be kept. An honest verifier
// makes none of these; one that is hostile chooses every byte.
func CheckUse(m *dayflyv1.Use) error {
	if _, err := token.ParseGrantID(m.GetGrant()); err != nil {
		return malformed("use: %v", err)
	}
	if id := m.GetPeerIdentity(); id != "" {
		if _, err := spiffeid.FromString(id); err != nil || len(id) > maxIdentityBytes {
			return malformed("use: the peer is no SPIFFE ID")
		}
	}
	switch {
	case !short(m.GetPeerAddress(), MaxAddressBytes) || !short(m.GetRefusalReason(), MaxReasonBytes):
		return malformed("use: an address or a reason that is too long or unprintable")
	case m.GetAccepted() != (m.GetRefusalReason() == ""):
		return malformed("use: accepted with a reason, or refused without one")
	case m.GetCount() == 0 || m.GetCount() > maxCount:
		return malformed("use: a count of nothing, or beyond what anybody could count")
	case len(m.GetFingerprint()) != 0 && len(m.GetFingerprint()) != sha256.Size:
		return malformed("use: a fingerprint that is not %d bytes", sha256.Size)
	case !sane(m):
		return malformed("use: at no time, or ended before it began")
	}
	if id := m.GetVerifierIdentity(); id != "" {
		if _, err := spiffeid.FromString(id); err != nil || len(id) > maxIdentityBytes {
			return malformed("use: the verifier is no SPIFFE ID")
		}
	}
	if m.GetVerifierInstance() != "" && !feed.ValidInstance(m.GetVerifierInstance()) {
		return malformed("use: the verifier's instance is none")
	}
	if m.GetKeyId() != "" {
		if _, err := token.ParseKeyID(m.GetKeyId()); err != nil {
			return malformed("use: %v", err)
		}
	}
	if m.GetEra() != "" {
		if _, err := token.ParseEra(m.GetEra()); err != nil {
			return malformed("use: %v", err)
		}
	}
	return nil
}

// short holds for printable ASCII of at most n bytes.
func short(s string, n int) bool {
	return len(s) <= n && !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' })
}

// PeerAddress returns an address as a use may hold it: "" for one that it may not.
func PeerAddress(s string) string {
	if !short(s, MaxAddressBytes) {
		return ""
	}
	return s
}

// sane holds for times that JSON and every calendar have.
func sane(m *dayflyv1.Use) bool {
	for _, t := range []*timestamppb.Timestamp{m.GetFirstSeen(), m.GetLastSeen()} {
		if !t.IsValid() || t.AsTime().Year() < 1970 || t.AsTime().Year() > 9999 {
			return false
		}
	}
	return !m.GetLastSeen().AsTime().Before(m.GetFirstSeen().AsTime())
}

// maxHeld bounds the reports of an Outbox: 2 MiB of them.
const maxHeld = 64

// An Outbox numbers the use reports of one instance and holds each until it has
// arrived. The receiver takes messages in order and keeps a report before it takes the
// next, so the answer to a ping that was sent after a report says that it is there. What
// no answer covered is sent again on the next stream, under its old number, by which the
// receiver knows it: nothing is lost with a stream, and nothing counted twice.
//
// What an Outbox holds dies with its process: the reports of a relay's or verifier's
// last ping interval. The zero value is ready; it may be used from any goroutine.
type Outbox struct {
	mu     sync.Mutex
	number uint64 // of the newest report
	held   []*dayflyv1.UseReport
	sent   int // how many of held went out on this stream
	asked  []asked
}

// asked is a ping, and the newest report that went before it.
type asked struct {
	nonce  string
	number uint64
}

// maxAsked bounds the pings that are remembered; later ones cover the same and more.
const maxAsked = 64

// Full reports whether new entries must wait where they are counted.
func (o *Outbox) Full() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.held) >= maxHeld
}

// Put makes reports of bounded size. Entries beyond what the outbox may hold are
// counted as dropped by the last of them.
func (o *Outbox) Put(uses []*dayflyv1.Use, dropped uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	m, size := &dayflyv1.UseReport{}, 0
	flush := func() {
		if len(m.Uses) > 0 || m.Dropped > 0 {
			o.number++
			m.Number = o.number
			o.held = append(o.held, m)
		}
		m, size = &dayflyv1.UseReport{}, 0
	}
	for _, u := range uses {
		n := proto.Size(u) + 4
		if len(m.Uses) == MaxUses || size+n > MaxReportBytes {
			flush()
		}
		if len(o.held) >= maxHeld {
			dropped += u.GetCount()
			continue
		}
		m.Uses, size = append(m.Uses, u), size+n
	}
	m.Dropped = dropped
	flush()
}

// Reconnected begins a new stream: everything that is held goes out again.
func (o *Outbox) Reconnected() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.sent, o.asked = 0, nil
}

// Next returns the next report to send on this stream, nil if there is none.
func (o *Outbox) Next() *dayflyv1.UseReport {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.sent == len(o.held) {
		return nil
	}
	o.sent++
	return o.held[o.sent-1]
}

// Pinged notes a ping: it is called before the ping goes out.
func (o *Outbox) Pinged(nonce string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.sent == 0 {
		return
	}
	if len(o.asked) == maxAsked {
		o.asked = append(o.asked[:0], o.asked[1:]...)
	}
	o.asked = append(o.asked, asked{nonce, o.held[o.sent-1].GetNumber()})
}

// Answered lets go of the reports that went out before a ping.
func (o *Outbox) Answered(nonce string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for i, a := range o.asked {
		if a.nonce != nonce {
			continue
		}
		o.asked = o.asked[i+1:]
		for len(o.held) > 0 && o.held[0].GetNumber() <= a.number {
			o.held, o.sent = o.held[1:], o.sent-1
		}
		return
	}
}
