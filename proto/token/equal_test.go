package token_test

import (
	"crypto/x509"
	"reflect"
	"testing"

	"github.com/dayflyhq/dayfly/proto/token"
)

// TestPublicKeyEqual compares keys of every algorithm, and copies of them that were read
// from their bytes.
func TestPublicKeyEqual(t *testing.T) {
	var keys []token.PublicKey
	for _, alg := range []token.Algorithm{token.ES256, token.EdDSA, token.RS256} {
		for _, name := range []string{"one", "another"} {
			keys = append(keys, fixedKey(t, alg, name).public)
		}
	}
	for i, a := range keys {
		for j, b := range keys {
			der, err := x509.MarshalPKIXPublicKey(b.Key)
			if err != nil {
				t.Fatal(err)
			}
			read, err := x509.ParsePKIXPublicKey(der)
			if err != nil {
				t.Fatal(err)
			}
			b.ID = a.ID // an ID proves nothing
			copied := token.PublicKey{ID: a.ID, Algorithm: b.Algorithm, Key: read}
			if a.Equal(b) != (i == j) || a.Equal(copied) != (i == j) {
				t.Errorf("%s and %s: Equal = %t, of a copy %t, want %t", a.Algorithm, b.Algorithm, a.Equal(b), a.Equal(copied), i == j)
			}
		}
		other := a
		if other.Algorithm = token.RS256; a.Algorithm == token.RS256 {
			other.Algorithm = token.ES256
		}
		if a.Equal(other) || other.Equal(a) || a.Equal(token.PublicKey{}) || (token.PublicKey{}).Equal(a) || (token.PublicKey{}).Equal(token.PublicKey{}) {
			t.Errorf("%s: equal to a key of another algorithm, or to none", a.Algorithm)
		}
	}
}

// TestClone: what is written to a copy of claims doesn't show in them.
func TestClone(t *testing.T) {
	kid := fixedKey(t, token.ES256, "one").public.ID
	c, want := claims(t, kid, 3), claims(t, kid, 3)
	got := c.Clone()
	if !reflect.DeepEqual(&got, want) || len(got.Scopes) == 0 {
		t.Fatalf("got %+v, want %+v", got, c)
	}
	// Whatever of a copy can be written to by an index is written to.
	v := reflect.ValueOf(&got).Elem()
	for i := range v.NumField() {
		switch f := v.Field(i); f.Kind() {
		case reflect.Slice:
			for j := range f.Len() {
				f.Index(j).SetZero()
			}
		case reflect.Pointer, reflect.Map, reflect.Interface, reflect.Chan, reflect.Func:
			t.Errorf("%s may be shared", v.Type().Field(i).Name)
		}
	}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("the copy is shared: %+v", c)
	}
}
