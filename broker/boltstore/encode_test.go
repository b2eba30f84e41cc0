package boltstore_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"reflect"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/boltstore"
	"github.com/dayflyhq/dayfly/broker/storetest"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
)

var noon = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

func someGrants() []*broker.Grant {
	at := feed.Position{Era: 1, Seq: 300, Sum: feed.Sum{1, 2, 3}}
	root := storetest.Grant(1, storetest.Identity(1), noon, at)
	return []*broker.Grant{root, storetest.Grant(2, storetest.Identity(2), noon, at), storetest.Derive(4, root, storetest.Identity(3), at)}
}

func someRecords(t testing.TB) []broker.Record {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public, err := token.NewPublicKey(token.ES256, private.Public())
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(private.Public())
	if err != nil {
		t.Fatal(err)
	}
	key := &feed.Key{Public: public, DER: der, Certificates: [][]byte{{1}, {2, 3}}, Signature: []byte{4}}
	return []broker.Record{
		storetest.Era(1),
		storetest.Revocation("why", revocation.Everything(), revocation.Identity(storetest.Identity(1))),
		{Event: feed.Event{Lift: &feed.Lift{Lock: 1}}, Details: broker.Details{Time: noon, Reason: "<é>"}},
		{Event: feed.Event{Key: key}},
	}
}

func TestGrantsComeBack(t *testing.T) {
	for _, g := range someGrants() {
		b, err := boltstore.EncodeGrant(g)
		if err != nil {
			t.Fatal(err)
		}
		got, err := boltstore.DecodeGrant(b)
		if err != nil || !reflect.DeepEqual(got, g) {
			t.Errorf("%v\n got %+v\nwant %+v", err, got, g)
		}
		for n := range b {
			if _, err := boltstore.DecodeGrant(b[:n]); err == nil {
				t.Errorf("%d of %d bytes make a grant", n, len(b))
			}
		}
	}
	split := storetest.Grant(1, storetest.Identity(1), noon.Add(time.Nanosecond), feed.Position{})
	if _, err := boltstore.EncodeGrant(split); err == nil {
		t.Error("a grant that expires between seconds was encoded")
	}
}

func FuzzDecodeGrant(f *testing.F) {
	for _, g := range someGrants() {
		b, err := boltstore.EncodeGrant(g)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		g, err := boltstore.DecodeGrant(b)
		if err != nil {
			return
		}
		if again, err := boltstore.EncodeGrant(g); err != nil || !bytes.Equal(again, b) {
			t.Errorf("%x decodes, and encodes to %x (%v)", b, again, err)
		}
	})
}

func FuzzDecodeRecord(f *testing.F) {
	var at feed.Position
	for _, r := range someRecords(f) {
		r, at = r.Seal(at)
		b, err := boltstore.EncodeRecord(r, at.Era)
		if err != nil {
			f.Fatal(err)
		}
		if again, err := boltstore.Recode(b); err != nil || !bytes.Equal(again, b) {
			f.Fatalf("record %d does not come back: %v", r.Seq, err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		again, err := boltstore.Recode(b)
		if err == nil && !bytes.Equal(again, b) {
			t.Errorf("%x decodes, and encodes to %x", b, again)
		}
	})
}
