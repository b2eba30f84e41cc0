package token

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A GrantID is 5 bytes of the SHA-256 of its presenter, 6 bytes of time (ms since
// 1970) and 7 random bytes: it sorts by presenter, then by time, so that "all grants
// of X" is one range of a store. It is no secret. The zero value names no grant.
type GrantID struct{ b [grantIDSize]byte }

const (
	grantIDSize         = 18
	presenterPrefixSize = 5
)

// PresenterPrefix returns the bytes that begin every grant ID of a presenter.
// Two presenters may share a prefix; a reader of the range checks the record.
func PresenterPrefix(presenter spiffeid.ID) [presenterPrefixSize]byte {
	sum := sha256.Sum256([]byte(presenter.String()))
	return [presenterPrefixSize]byte(sum[:presenterPrefixSize])
}

// NewGrantID makes the ID of a new grant; random is usually crypto/rand.Reader.
func NewGrantID(presenter spiffeid.ID, at time.Time, random io.Reader) (GrantID, error) {
	var id GrantID
	prefix := PresenterPrefix(presenter)
	copy(id.b[:], prefix[:])
	var ms [8]byte
	binary.BigEndian.PutUint64(ms[:], uint64(at.UnixMilli()))
	copy(id.b[presenterPrefixSize:], ms[2:])
	if _, err := io.ReadFull(random, id.b[presenterPrefixSize+6:]); err != nil {
		return GrantID{}, fmt.Errorf("reading randomness: %w", err)
	}
	return id, nil
}

// ParseGrantID reads the text form: 24 characters of unpadded base64url.
func ParseGrantID(s string) (GrantID, error) {
	var id GrantID
	if err := decodeExact(id.b[:], s); err != nil {
		return GrantID{}, errors.New("a grant ID is 24 characters of base64url")
	}
	return id, nil
}

// GrantIDFromBytes reads the 18 bytes of a stored ID.
func GrantIDFromBytes(b []byte) (GrantID, error) {
	if len(b) != grantIDSize {
		return GrantID{}, fmt.Errorf("a grant ID is %d bytes, not %d", grantIDSize, len(b))
	}
	return GrantID{[grantIDSize]byte(b)}, nil
}

// Bytes returns the 18 bytes, which sort as the text does not.
func (id GrantID) Bytes() []byte { return append([]byte(nil), id.b[:]...) }

// IsZero reports whether id names no grant.
func (id GrantID) IsZero() bool { return id == GrantID{} }

func (id GrantID) String() string { return base64.RawURLEncoding.EncodeToString(id.b[:]) }

// A KeyID names a signing key: the first 6 bytes of the SHA-256 of its
// SubjectPublicKeyInfo, as 8 characters of base64url. The zero value names none.
type KeyID struct{ s string }

// KeyIDOf derives the ID of a public key.
func KeyIDOf(pub crypto.PublicKey) (KeyID, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return KeyID{}, fmt.Errorf("encoding public key: %w", err)
	}
	sum := sha256.Sum256(der)
	return KeyID{base64.RawURLEncoding.EncodeToString(sum[:6])}, nil
}

// ParseKeyID reads 8 characters of base64url.
func ParseKeyID(s string) (KeyID, error) {
	var b [6]byte
	if err := decodeExact(b[:], s); err != nil {
		return KeyID{}, errors.New("a key ID is 8 characters of base64url")
	}
	return KeyID{s}, nil
}

// IsZero reports whether id names no key.
func (id KeyID) IsZero() bool { return id.s == "" }

func (id KeyID) String() string { return id.s }

// A Thumbprint is the first 16 bytes of the SHA-256 of an SVID's certificate (DER).
// The zero value stands for an identity that no certificate proved.
type Thumbprint [16]byte

// ThumbprintOf returns the thumbprint of a certificate.
func ThumbprintOf(cert *x509.Certificate) Thumbprint {
	sum := sha256.Sum256(cert.Raw)
	return Thumbprint(sum[:16])
}

// ParseThumbprint reads 32 lower-case hexadecimal digits.
func ParseThumbprint(s string) (Thumbprint, error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != 16 || hex.EncodeToString(b) != s {
		return Thumbprint{}, errors.New("an SVID thumbprint is 32 lower-case hexadecimal digits")
	}
	return Thumbprint(b), nil
}

// IsZero reports whether there is no certificate.
func (t Thumbprint) IsZero() bool { return t == Thumbprint{} }

func (t Thumbprint) String() string { return hex.EncodeToString(t[:]) }

// An Era tells apart the lives of one broker's log: a restored backup begins a
// greater one. Its text form is 8 lower-case hexadecimal digits. 0 is no era.
type Era uint32

// NextEra returns an era greater than previous, and than any that a broker with a
// sane clock began before now: seconds since 1970, or one more than previous.
func NextEra(previous Era, now time.Time) Era {
	return max(previous+1, Era(uint32(now.Unix())))
}

// ParseEra reads 8 lower-case hexadecimal digits.
func ParseEra(s string) (Era, error) {
	n, err := strconv.ParseUint(s, 16, 32)
	if err != nil || Era(n).String() != s || n == 0 {
		return 0, errors.New("an era is 8 lower-case hexadecimal digits")
	}
	return Era(n), nil
}

func (e Era) String() string { return fmt.Sprintf("%08x", uint32(e)) }

// base64url is unpadded, and has one spelling of any bytes: no spare bits.
var base64url = base64.RawURLEncoding.Strict()

// decode reads base64url, without the line breaks that encoding/base64 reads past.
func decode(s string) ([]byte, error) {
	if strings.IndexByte(s, '\n') >= 0 || strings.IndexByte(s, '\r') >= 0 {
		return nil, errors.New("line break in base64url")
	}
	return base64url.DecodeString(s)
}

// decodeExact fills dst from its only base64url spelling. With a line break in it the
// right number of characters is too few bytes.
func decodeExact(dst []byte, s string) error {
	if len(s) != base64url.EncodedLen(len(dst)) {
		return errors.New("wrong length")
	}
	n, err := base64url.Decode(dst, []byte(s))
	if err == nil && n != len(dst) {
		err = errors.New("wrong length")
	}
	return err
}
