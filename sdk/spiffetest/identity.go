package spiffetest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// ErrDenied is what a Source answers for an identity that SetDenied denied; the
// Workload API says PermissionDenied.
var ErrDenied = errors.New("spiffetest: no identity issued")

// identity is one SPIFFE ID that the trust domain knows. All but id and socket
// are guarded by TrustDomain.mu.
type identity struct {
	id     spiffeid.ID
	socket *socket

	svid    *x509svid.SVID
	renewAt time.Time // by Config.Now
	timer   *time.Timer
	denied  bool
	others  []*identity   // whose SVIDs its socket returns too
	changed chan struct{} // closed and replaced at every change that a stream might want to send
}

// announce wakes every stream of the identity.
func (i *identity) announce() {
	close(i.changed)
	i.changed = make(chan struct{})
}

// announce wakes every stream that shows the identity. It needs mu.
func (td *TrustDomain) announce(ident *identity) {
	ident.announce()
	for _, host := range td.identities {
		if slices.Contains(host.others, ident) {
			host.announce()
		}
	}
}

// Workload makes id known if it isn't yet, serves the Workload API for it, and
// returns its address (unix:///path/n.sock), to be used as
// SPIFFE_ENDPOINT_SOCKET. Asking again returns the same address; it doesn't start
// a socket that StopSocket stopped.
func (td *TrustDomain) Workload(id spiffeid.ID) (addr string, err error) {
	ident, err := td.identity(id)
	if err != nil {
		return "", err
	}
	if err := ident.socket.startFirst(); err != nil {
		return "", fmt.Errorf("spiffetest: serving the Workload API for %s: %w", id, err)
	}
	// A Close between the two steps above has seen the identity, but perhaps not
	// its socket.
	if td.isClosed() {
		ident.socket.stop()
		return "", ErrClosed
	}
	return ident.socket.addr(), nil
}

// StopSocket ends the Workload API of id: its streams break and its socket is
// gone from the directory, until StartSocket.
func (td *TrustDomain) StopSocket(id spiffeid.ID) error {
	ident, err := td.known(id)
	if err != nil {
		return err
	}
	ident.socket.stop()
	return nil
}

// StartSocket serves the Workload API of id again, on the same path. It does
// nothing when it is being served.
func (td *TrustDomain) StartSocket(id spiffeid.ID) error {
	ident, err := td.known(id)
	if err != nil {
		return err
	}
	if err := ident.socket.start(); err != nil {
		return fmt.Errorf("spiffetest: serving the Workload API for %s: %w", id, err)
	}
	if td.isClosed() {
		ident.socket.stop()
		return ErrClosed
	}
	return nil
}

// Rotate gives id a new SVID, with a new key and serial number, and pushes it to
// every open stream. The old one stays valid until it expires.
func (td *TrustDomain) Rotate(id spiffeid.ID) error {
	ident, err := td.known(id)
	if err != nil {
		return err
	}
	td.mu.Lock()
	defer td.mu.Unlock()
	if td.closed {
		return ErrClosed
	}
	return td.rotate(ident)
}

// SetDenied makes the Workload API answer PermissionDenied to id, as it does when
// a registration entry was deleted, or ends that. Open streams of a denied
// identity end with the same status. SVIDs already handed out stay valid.
func (td *TrustDomain) SetDenied(id spiffeid.ID, denied bool) error {
	ident, err := td.known(id)
	if err != nil {
		return err
	}
	td.mu.Lock()
	defer td.mu.Unlock()
	ident.denied = denied
	td.announce(ident)
	return nil
}

// SetOthers makes the Workload API of id return the X509-SVIDs of others too, after its
// own, as it does for a process with several registration entries; without any, it returns
// its own alone again. Those that are denied are left out.
func (td *TrustDomain) SetOthers(id spiffeid.ID, others ...spiffeid.ID) error {
	ident, err := td.identity(id)
	if err != nil {
		return err
	}
	list := make([]*identity, len(others))
	for i, other := range others {
		if list[i], err = td.identity(other); err != nil {
			return err
		}
	}
	td.mu.Lock()
	defer td.mu.Unlock()
	ident.others = list
	ident.announce()
	return nil
}

// IssueSVID mints an X509-SVID for any ID of the trust domain, dated as wanted:
// expired, from the future, or of any length. It isn't the one that the Workload
// API serves, and the ID needs no socket.
func (td *TrustDomain) IssueSVID(id spiffeid.ID, opts SVIDOptions) (*x509svid.SVID, error) {
	td.mu.Lock()
	defer td.mu.Unlock()
	return td.issue(id, opts)
}

// IssueJWTSVID mints a JWT-SVID for any ID of the trust domain, dated as wanted:
// NotBefore becomes iat (the time of issue when zero, never backdated), NotAfter
// exp. It needs at least one audience.
func (td *TrustDomain) IssueJWTSVID(id spiffeid.ID, audience []string, opts SVIDOptions) (string, error) {
	if err := td.checkMember(id); err != nil {
		return "", err
	}
	if len(audience) == 0 {
		return "", errors.New("spiffetest: a JWT-SVID needs an audience")
	}
	now := td.cfg.Now()
	if opts.NotBefore.IsZero() {
		opts.NotBefore = now
	}
	if opts.NotAfter.IsZero() {
		opts.NotAfter = now.Add(td.cfg.JWTSVIDTTL)
	}
	token, err := td.jwt.issue(id, audience, opts.NotBefore, opts.NotAfter)
	if err != nil {
		return "", fmt.Errorf("spiffetest: %w", err)
	}
	return token, nil
}

// WritePEM writes the current SVID of id (which is made known if it isn't yet)
// for tools that read files: svid.pem, key.pem and bundle.pem in dir, which is
// created with mode 0700. Files have mode 0600 and are replaced whole, one after
// the other. They aren't rewritten when the SVID rotates: call WritePEM again.
func (td *TrustDomain) WritePEM(dir string, id spiffeid.ID) error {
	svid, err := td.Source(id).GetX509SVID()
	if err != nil {
		return err
	}
	chain, key, err := svid.Marshal()
	if err != nil {
		return fmt.Errorf("spiffetest: encoding the SVID of %s: %w", id, err)
	}
	bundle, err := td.Bundle().Marshal()
	if err != nil {
		return fmt.Errorf("spiffetest: encoding the bundle: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("spiffetest: creating a directory for PEM files: %w", err)
	}
	for _, f := range []struct {
		name string
		data []byte
	}{{"svid.pem", chain}, {"key.pem", key}, {"bundle.pem", bundle}} {
		if err := replaceFile(filepath.Join(dir, f.name), f.data); err != nil {
			return fmt.Errorf("spiffetest: writing %s: %w", f.name, err)
		}
	}
	return nil
}

// replaceFile writes a file of mode 0600 such that a reader sees the old or the
// new content. (os.CreateTemp makes files of that mode.)
func replaceFile(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path))
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails once renamed, as it should
	_, err = f.Write(data)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// A Source is the Workload API of one identity without a socket: an
// x509svid.Source, x509bundle.Source and jwtbundle.Source that always gives the
// newest. Use it where a process holds several identities, and inside a
// testing/synctest bubble.
type Source struct {
	td *TrustDomain
	id spiffeid.ID
}

var (
	_ x509svid.Source   = Source{}
	_ x509bundle.Source = Source{}
	_ jwtbundle.Source  = Source{}
)

// Source returns the source of id, which is made known when it is first asked.
func (td *TrustDomain) Source(id spiffeid.ID) Source {
	return Source{td: td, id: id}
}

// ID returns whose source this is.
func (s Source) ID() spiffeid.ID { return s.id }

// GetX509SVID returns the current SVID, or ErrDenied.
func (s Source) GetX509SVID() (*x509svid.SVID, error) {
	ident, err := s.td.identity(s.id)
	if err != nil {
		return nil, err
	}
	s.td.mu.Lock()
	defer s.td.mu.Unlock()
	return s.td.current(ident)
}

// GetX509BundleForTrustDomain is that of the TrustDomain.
func (s Source) GetX509BundleForTrustDomain(name spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	return s.td.GetX509BundleForTrustDomain(name)
}

// GetJWTBundleForTrustDomain is that of the TrustDomain.
func (s Source) GetJWTBundleForTrustDomain(name spiffeid.TrustDomain) (*jwtbundle.Bundle, error) {
	return s.td.GetJWTBundleForTrustDomain(name)
}

// identity returns what is known of id, after making it known if need be.
func (td *TrustDomain) identity(id spiffeid.ID) (*identity, error) {
	if err := td.checkMember(id); err != nil {
		return nil, err
	}
	td.mu.Lock()
	defer td.mu.Unlock()
	if td.closed {
		return nil, ErrClosed
	}
	if ident, ok := td.identities[id]; ok {
		return ident, nil
	}
	ident := &identity{id: id, changed: make(chan struct{})}
	path := filepath.Join(td.dir, strconv.Itoa(len(td.identities)+1)+".sock")
	ident.socket = newSocket(path, &server{td: td, ident: ident}, td.cfg.Log.With("spiffe_id", id.String()))
	if err := td.rotate(ident); err != nil {
		return nil, err
	}
	td.identities[id] = ident
	return ident, nil
}

// known returns what is known of id, or an error.
func (td *TrustDomain) known(id spiffeid.ID) (*identity, error) {
	td.mu.Lock()
	defer td.mu.Unlock()
	if td.closed {
		return nil, ErrClosed
	}
	ident, ok := td.identities[id]
	if !ok {
		return nil, fmt.Errorf("spiffetest: %s is not known here; call Workload or Source for it first", id)
	}
	return ident, nil
}

func (td *TrustDomain) isClosed() bool {
	td.mu.Lock()
	defer td.mu.Unlock()
	return td.closed
}

// checkMember refuses an ID that no SVID of this trust domain may carry.
func (td *TrustDomain) checkMember(id spiffeid.ID) error {
	switch {
	case id.IsZero() || id.TrustDomain() != td.cfg.TrustDomain:
		return fmt.Errorf("spiffetest: %q is not in trust domain %s", id, td.cfg.TrustDomain)
	case id.Path() == "":
		return fmt.Errorf("spiffetest: %q has no path: a workload's SPIFFE ID needs one", id)
	}
	return nil
}

// issue needs td.mu.
func (td *TrustDomain) issue(id spiffeid.ID, opts SVIDOptions) (*x509svid.SVID, error) {
	if err := td.checkMember(id); err != nil {
		return nil, err
	}
	now := td.cfg.Now()
	if opts.NotBefore.IsZero() {
		opts.NotBefore = now.Add(-td.cfg.Backdate)
	}
	if opts.NotAfter.IsZero() {
		opts.NotAfter = now.Add(td.cfg.SVIDTTL)
	}
	svid, err := td.ca.issue(id, opts.NotBefore, opts.NotAfter)
	if err != nil {
		return nil, fmt.Errorf("spiffetest: %w", err)
	}
	return svid, nil
}

// current returns the SVID to serve now. It needs td.mu.
func (td *TrustDomain) current(ident *identity) (*x509svid.SVID, error) {
	if ident.denied {
		return nil, ErrDenied
	}
	if !td.closed && !td.cfg.Now().Before(ident.renewAt) {
		if err := td.rotate(ident); err != nil {
			return nil, err
		}
	}
	return ident.svid, nil
}

// rotate replaces the SVID, tells the streams, and sets the timer for the next
// time. It needs td.mu and an open trust domain.
func (td *TrustDomain) rotate(ident *identity) error {
	svid, err := td.issue(ident.id, SVIDOptions{})
	if err != nil {
		return err
	}
	td.stopTimer(ident)
	ident.svid = svid
	ident.renewAt = td.cfg.Now().Add(td.cfg.SVIDTTL / 2)
	td.announce(ident)

	td.timers.Add(1)
	ident.timer = time.AfterFunc(td.cfg.SVIDTTL/2, func() {
		defer td.timers.Done()
		td.rotateOnTime(ident, svid)
	})
	return nil
}

// rotateOnTime replaces an SVID whose half-life is over, unless somebody did.
func (td *TrustDomain) rotateOnTime(ident *identity, old *x509svid.SVID) {
	td.mu.Lock()
	defer td.mu.Unlock()
	if td.closed || ident.svid != old {
		return
	}
	if err := td.rotate(ident); err != nil {
		td.cfg.Log.Error("rotating an SVID", "spiffe_id", ident.id.String(), "error", err)
	}
}

// stopTimer needs td.mu.
func (td *TrustDomain) stopTimer(ident *identity) {
	if ident.timer != nil && ident.timer.Stop() {
		td.timers.Done()
	}
}
