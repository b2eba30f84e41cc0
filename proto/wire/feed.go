package wire

import (
	"crypto/sha256"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/durationpb"
)

// Limits of a subscription.
const (
	// MinBound and MaxBound are what a staleness bound may be: below, pings would
	// flood; above, a token lives shorter than the bound.
	MinBound = 500 * time.Millisecond
	MaxBound = time.Hour
	// DefaultBound is longer than a broker's restart and shorter than a token's life.
	DefaultBound = 30 * time.Second
	// MaxAudiences bounds the names that one verifier answers to.
	MaxAudiences = 64
	// MinNonceBytes and MaxNonceBytes bound a ping's nonce.
	MinNonceBytes = 8
	MaxNonceBytes = 32
)

// Event makes a message.
func Event(e feed.Event) *dayflyv1.Event {
	m := &dayflyv1.Event{Sequence: e.Seq, PrivateDigest: e.Private[:], Sum: e.Sum[:]}
	switch {
	case e.Revocation != nil:
		m.Body = &dayflyv1.Event_Revocation{Revocation: &dayflyv1.RevocationEvent{
			Selectors: Selectors(e.Revocation.Selectors),
		}}
	case e.Lift != nil:
		m.Body = &dayflyv1.Event_Lift{Lift: &dayflyv1.LiftEvent{Lock: e.Lift.Lock}}
	case e.Key != nil:
		m.Body = &dayflyv1.Event_Key{Key: Key(*e.Key)}
	case e.Era != nil:
		m.Body = &dayflyv1.Event_Era{Era: &dayflyv1.EraEvent{Era: e.Era.Era.String()}}
	}
	return m
}

// ToEvent reads an event and validates it; its place in the log is for feed to check.
func ToEvent(m *dayflyv1.Event) (feed.Event, error) {
	if len(m.GetPrivateDigest()) != sha256.Size || len(m.GetSum()) != sha256.Size {
		return feed.Event{}, malformed("event: a hash that is not %d bytes", sha256.Size)
	}
	e := feed.Event{
		Seq:     m.GetSequence(),
		Private: [sha256.Size]byte(m.GetPrivateDigest()),
		Sum:     feed.Sum(m.GetSum()),
	}
	if err := readBody(m, &e); err != nil {
		return feed.Event{}, err
	}
	if err := e.Validate(); err != nil {
		return feed.Event{}, err
	}
	return e, nil
}

func readBody(m *dayflyv1.Event, e *feed.Event) error {
	switch body := m.GetBody().(type) {
	case *dayflyv1.Event_Revocation:
		selectors, err := ToSelectors(body.Revocation.GetSelectors())
		if err != nil {
			return err
		}
		e.Revocation = &feed.Revocation{Selectors: selectors}
	case *dayflyv1.Event_Lift:
		e.Lift = &feed.Lift{Lock: body.Lift.GetLock()}
	case *dayflyv1.Event_Key:
		key, err := ToKey(body.Key)
		if err != nil {
			return err
		}
		e.Key = &key
	case *dayflyv1.Event_Era:
		era, err := token.ParseEra(body.Era.GetEra())
		if err != nil {
			return malformed("%v", err)
		}
		e.Era = &feed.Era{Era: era}
	}
	return nil
}

// Delivery makes the message of one step of a cursor: a Snapshot or Events.
func Delivery(d feed.Delivery) *dayflyv1.FollowResponse {
	events := make([]*dayflyv1.Event, len(d.Events))
	for i, e := range d.Events {
		events[i] = Event(e)
	}
	if d.Snapshot {
		return &dayflyv1.FollowResponse{Message: &dayflyv1.FollowResponse_Snapshot{Snapshot: &dayflyv1.Snapshot{
			Events: events, Horizon: Position(d.Horizon), Position: Position(d.Position), Complete: d.Complete,
		}}}
	}
	return &dayflyv1.FollowResponse{Message: &dayflyv1.FollowResponse_Events{Events: &dayflyv1.Events{
		Events: events, Horizon: Position(d.Horizon),
	}}}
}

// ToDelivery reads a Snapshot or Events. Those of Events have no Position: their
// events say it.
func ToDelivery(m *dayflyv1.FollowResponse) (feed.Delivery, error) {
	switch body := m.GetMessage().(type) {
	case *dayflyv1.FollowResponse_Snapshot:
		return toSnapshot(body.Snapshot)
	case *dayflyv1.FollowResponse_Events:
		return toEvents(body.Events)
	}
	return feed.Delivery{}, malformed("neither a snapshot nor events")
}

func toSnapshot(m *dayflyv1.Snapshot) (feed.Delivery, error) {
	d := feed.Delivery{Snapshot: true, Complete: m.GetComplete()}
	var err error
	if d.Events, err = readEvents(m.GetEvents()); err != nil {
		return feed.Delivery{}, err
	}
	if d.Horizon, err = ToPosition(m.GetHorizon()); err != nil {
		return feed.Delivery{}, err
	}
	if d.Position, err = ToPosition(m.GetPosition()); err != nil {
		return feed.Delivery{}, err
	}
	if d.Position.Era == 0 {
		return feed.Delivery{}, malformed("a snapshot without its position")
	}
	return d, nil
}

func toEvents(m *dayflyv1.Events) (feed.Delivery, error) {
	var d feed.Delivery
	var err error
	if d.Events, err = readEvents(m.GetEvents()); err != nil {
		return feed.Delivery{}, err
	}
	if d.Horizon, err = ToPosition(m.GetHorizon()); err != nil {
		return feed.Delivery{}, err
	}
	return d, nil
}

func readEvents(ms []*dayflyv1.Event) ([]feed.Event, error) {
	events := make([]feed.Event, len(ms))
	for i, m := range ms {
		e, err := ToEvent(m)
		if err != nil {
			return nil, err
		}
		events[i] = e
	}
	return events, nil
}

// A Subscription is a Subscribe that was read: who follows and what it promises.
type Subscription struct {
	Instance     string // random, new with every start
	Audiences    []string
	Bound        time.Duration // MinBound to MaxBound
	AcceptsStale bool
	Position     feed.Position // zero for a new verifier
	Relay        bool
	SignedHeads  bool
	NewestHead   feed.SignedHead // the newest that it was given; zero for none
}

// Subscribe makes the message.
func Subscribe(s Subscription) *dayflyv1.Subscribe {
	return &dayflyv1.Subscribe{
		Instance:     s.Instance,
		Audiences:    s.Audiences,
		MaxStaleness: durationpb.New(s.Bound),
		OnStale:      OnStale(s.AcceptsStale),
		Position:     Position(s.Position),
		Relay:        s.Relay,
		SignedHeads:  s.SignedHeads,

		NewestSignedHead: SignedHead(s.NewestHead),
	}
}

// ToSubscription reads a Subscribe. Only a relay may name no audience.
func ToSubscription(m *dayflyv1.Subscribe) (Subscription, error) {
	s := Subscription{
		Instance:    m.GetInstance(),
		Audiences:   m.GetAudiences(),
		Relay:       m.GetRelay(),
		SignedHeads: m.GetSignedHeads(),
	}
	var err error
	if s.Bound, err = ToDuration(m.GetMaxStaleness()); err != nil {
		return Subscription{}, err
	}
	if s.AcceptsStale, err = ToOnStale(m.GetOnStale()); err != nil {
		return Subscription{}, err
	}
	if s.Position, err = ToPosition(m.GetPosition()); err != nil {
		return Subscription{}, err
	}
	if s.NewestHead, err = ToSignedHead(m.GetNewestSignedHead()); err != nil {
		return Subscription{}, err
	}
	return s, s.validate()
}

func (s *Subscription) validate() error {
	switch {
	case !feed.ValidInstance(s.Instance):
		return malformed("an instance is %d to %d characters of base64url", feed.MinInstance, feed.MaxInstance)
	case s.Bound < MinBound || s.Bound > MaxBound:
		return malformed("a staleness bound is %v to %v", MinBound, MaxBound)
	case len(s.Audiences) > MaxAudiences || len(s.Audiences) == 0 && !s.Relay:
		return malformed("%d audiences, not 1 to %d", len(s.Audiences), MaxAudiences)
	}
	for _, a := range s.Audiences {
		if err := token.ValidateAudience(a); err != nil {
			return malformed("%v", err)
		}
	}
	return nil
}

// ToNonce reads the nonce of a ping.
func ToNonce(b []byte) (string, error) {
	if len(b) < MinNonceBytes || len(b) > MaxNonceBytes {
		return "", malformed("a nonce is %d to %d bytes", MinNonceBytes, MaxNonceBytes)
	}
	return string(b), nil
}

// A Pong is the answer to a ping.
type Pong struct {
	Nonce   string
	Head    feed.Position // as of the knowledge that the answer stands on
	Age     time.Duration // how old that knowledge is
	Horizon feed.Position
	// Signed and Path are for those who asked for signed heads. A signed head without a
	// path to the nonce is one to keep and answers nothing.
	Signed feed.SignedHead
	Path   feed.NoncePath
}

// PongMessage makes the message down.
func PongMessage(p Pong) *dayflyv1.FollowResponse {
	return &dayflyv1.FollowResponse{Message: &dayflyv1.FollowResponse_Pong{Pong: &dayflyv1.Pong{
		Nonce: []byte(p.Nonce), Head: Position(p.Head), Age: durationpb.New(p.Age), Horizon: Position(p.Horizon),
		SignedHead: SignedHead(p.Signed), NoncePath: p.Path.Hashes, NonceIndex: p.Path.Index,
	}}}
}

// ToPong reads an answer. One without a head or an age proves nothing and is
// malformed.
func ToPong(m *dayflyv1.Pong) (Pong, error) {
	var p Pong
	var err error
	if p.Nonce, err = ToNonce(m.GetNonce()); err != nil {
		return Pong{}, err
	}
	if p.Head, err = ToPosition(m.GetHead()); err != nil {
		return Pong{}, err
	}
	if p.Head.Era == 0 {
		return Pong{}, malformed("an answer without a head")
	}
	if p.Age, err = ToDuration(m.GetAge()); err != nil {
		return Pong{}, err
	}
	if p.Horizon, err = ToPosition(m.GetHorizon()); err != nil {
		return Pong{}, err
	}
	if p.Signed, err = ToSignedHead(m.GetSignedHead()); err != nil {
		return Pong{}, err
	}
	p.Path = feed.NoncePath{Hashes: m.GetNoncePath(), Index: m.GetNonceIndex()}
	return p, nil
}

// SignedHead makes a message; nil for the zero value.
func SignedHead(h feed.SignedHead) *dayflyv1.SignedHead {
	if len(h.Statement) == 0 {
		return nil
	}
	return &dayflyv1.SignedHead{Statement: h.Statement, Signature: h.Signature, Certificates: h.Certificates}
}

// maxSignatureBytes is more than RSA of any size in use takes.
const maxSignatureBytes = 2 << 10

// ToSignedHead reads a signed head, which is not verified by that; an absent one is the
// zero value.
func ToSignedHead(m *dayflyv1.SignedHead) (feed.SignedHead, error) {
	if m == nil {
		return feed.SignedHead{}, nil
	}
	h := feed.SignedHead{Statement: m.GetStatement(), Signature: m.GetSignature(), Certificates: m.GetCertificates()}
	if _, err := feed.ParseHeadStatement(h.Statement); err != nil {
		return feed.SignedHead{}, err
	}
	if len(h.Signature) == 0 || len(h.Signature) > maxSignatureBytes || len(h.Certificates) == 0 || len(h.Certificates) > MaxCertificates {
		return feed.SignedHead{}, malformed("a signed head without a signature or a chain, or with too large ones")
	}
	for _, c := range h.Certificates {
		if len(c) > MaxCertificateBytes {
			return feed.SignedHead{}, malformed("a certificate of %d bytes", len(c))
		}
	}
	return h, nil
}

// Relayed makes the message of what a relay says of one below.
func Relayed(r feed.Relayed) *dayflyv1.RelayedVerifier {
	return &dayflyv1.RelayedVerifier{
		Path: r.Path, Audiences: r.Audiences, MaxStaleness: durationpb.New(r.Bound), OnStale: OnStale(r.AcceptsStale),
		Acknowledged: Position(r.Acked), LastAnswerAge: durationpb.New(r.LastAnswerAge), Gone: r.Gone,
		Identity: r.Identity,
	}
}

// ToRelayed reads a relay's report.
func ToRelayed(ms []*dayflyv1.RelayedVerifier) ([]feed.Relayed, error) {
	out := make([]feed.Relayed, len(ms))
	for i, m := range ms {
		var err error
		if out[i], err = toRelayed(m); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func toRelayed(m *dayflyv1.RelayedVerifier) (feed.Relayed, error) {
	n := len(m.GetPath())
	if n == 0 || n > feed.MaxPath {
		return feed.Relayed{}, malformed("a path of %d instances, not 1 to %d", n, feed.MaxPath)
	}
	for _, instance := range m.GetPath() {
		if !feed.ValidInstance(instance) {
			return feed.Relayed{}, malformed("a path with what is no instance")
		}
	}
	sub, err := ToSubscription(&dayflyv1.Subscribe{
		Instance: m.GetPath()[n-1], Audiences: m.GetAudiences(), MaxStaleness: m.GetMaxStaleness(),
		OnStale: m.GetOnStale(), Position: m.GetAcknowledged(), Relay: true, // which may name no audience
	})
	if err != nil {
		return feed.Relayed{}, err
	}
	r := feed.Relayed{Path: m.GetPath(), Audiences: sub.Audiences, Bound: sub.Bound, AcceptsStale: sub.AcceptsStale, Acked: sub.Position, Gone: m.GetGone(), Identity: m.GetIdentity()}
	if r.Identity != "" {
		if _, err := spiffeid.FromString(r.Identity); err != nil {
			return feed.Relayed{}, malformed("an identity that is no SPIFFE ID")
		}
	}
	if m.GetLastAnswerAge() != nil {
		if r.LastAnswerAge, err = ToDuration(m.GetLastAnswerAge()); err != nil {
			return feed.Relayed{}, err
		}
	}
	return r, nil
}
