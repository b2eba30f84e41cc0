package broker_test

import (
	"crypto"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"
)

// Whatever is asked for and whatever policy says, a child has no scope that its parent
// lacks, no later expiry, the parent's lineage before its own, and the same transaction.
func TestExchangeOnlyNarrows(t *testing.T) {
	w := newWorld(t)
	names := []string{"a", "b", "c", "d", "e"}
	scopes := rapid.SliceOfDistinct(rapid.SampledFrom(names), func(s string) string { return s })
	var granted broker.Decision
	w.policy.set(func(broker.Question) (broker.Decision, error) { return granted, nil })
	rapid.Check(t, func(rt *rapid.T) {
		decide := func(label string) {
			granted = broker.Decision{Allow: true, Scopes: scopes.Draw(rt, label+" granted"), TTL: time.Duration(rapid.Int64Range(-1, int64(3*token.MaxTTL)).Draw(rt, label+" ttl"))}
		}
		decide("root")
		chain := rapid.IntRange(1, token.MaxDepth).Draw(rt, "chain")
		presenter := 0
		parent, err := w.b.Issue(ctx, w.caller("hop-0"), broker.Request{Audience: id("hop-1").String()})
		if err != nil {
			if granted.TTL > 0 && granted.TTL < time.Second {
				return // policy gave less than a token can say
			}
			rt.Fatal(err)
		}
		for range chain {
			presenter++
			decide("derived")
			asked := scopes.Draw(rt, "asked")
			req := broker.Request{
				Audience: id(fmt.Sprintf("hop-%d", presenter+1)).String(), Scopes: asked, Subject: parent.Token,
				TTL: time.Duration(rapid.Int64Range(0, int64(token.MaxTTL/time.Second)).Draw(rt, "asked ttl")) * time.Second,
			}
			remaining := parent.Grant.Expires.Sub(w.clock.Now())
			child, err := w.b.Exchange(ctx, w.caller(fmt.Sprintf("hop-%d", presenter)), req)
			shares := slices.ContainsFunc(granted.Scopes, func(s string) bool { return slices.Contains(parent.Grant.Scopes, s) })
			lacks := len(asked) == 0 && len(granted.Scopes) > 0 && !shares || len(asked) > 0 && slices.ContainsFunc(granted.Scopes, func(s string) bool { return !slices.Contains(parent.Grant.Scopes, s) })
			switch {
			case len(parent.Grant.Lineage) == token.MaxDepth:
				if !errors.Is(err, broker.ErrChainTooDeep) {
					rt.Fatalf("at full depth: %v", err)
				}
				return
			case req.TTL > remaining:
				if !errors.Is(err, broker.ErrTTLLongerParent) {
					rt.Fatalf("asked %s of %s: %v", req.TTL, remaining, err)
				}
				return
			case lacks:
				if !errors.Is(err, broker.ErrScopeWiderParent) {
					rt.Fatalf("asked %v, granted %v of %v: %v", asked, granted.Scopes, parent.Grant.Scopes, err)
				}
				return
			case granted.TTL > 0 && granted.TTL < time.Second:
				return
			case err != nil:
				rt.Fatal(err)
			}
			narrower(rt, parent, child)
			parent = child
			w.clock.advance(time.Duration(rapid.Int64Range(0, 900).Draw(rt, "pause")) * time.Millisecond)
			if !w.clock.Now().Before(parent.Grant.Expires) {
				return
			}
		}
	})
}

// A derived token without any scope would be refused by whom it is for, and nobody would
// know why: the broker says it, and gives none.
func TestNoScopeInCommon(t *testing.T) {
	w := newWorld(t)
	scopes := map[broker.Action][]string{broker.ActionIssue: {"orders.read"}, broker.ActionExchange: {"ledger.read", "ledger.write"}}
	w.policy.set(func(q broker.Question) (broker.Decision, error) {
		return broker.Decision{Allow: true, Scopes: scopes[q.Action]}, nil
	})
	parent, err := w.b.Issue(ctx, w.caller("payments"), broker.Request{Audience: id("orders").String()})
	if err != nil {
		t.Fatal(err)
	}
	req := broker.Request{Audience: "ledger", Subject: parent.Token}
	_, err = w.b.Exchange(ctx, w.caller("orders"), req)
	refused(t, err, broker.ErrScopeWiderParent)
	if want := "none of the scopes that policy gives: ledger.read ledger.write"; !strings.Contains(err.Error(), want) {
		t.Errorf("%v, without %q", err, want)
	}
	scopes[broker.ActionExchange] = nil // an audience that knows no scopes
	if child, err := w.b.Exchange(ctx, w.caller("orders"), req); err != nil || len(child.Grant.Scopes) != 0 {
		t.Errorf("without scopes on either side: %v", err)
	}
}

func narrower(t *rapid.T, parent, child *broker.Credential) {
	p, c := parent.Grant, child.Grant
	tok, err := token.Inspect(child.Token.Reveal())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range tok.Scopes {
		if !slices.Contains(p.Scopes, s) {
			t.Fatalf("the child has %q, its parent only %q", s, p.Scopes)
		}
	}
	if tok.Expires.After(p.Expires) || tok.Expires.Sub(tok.IssuedAt) > token.MaxTTL {
		t.Fatalf("the child lives until %s, its parent until %s", tok.Expires, p.Expires)
	}
	if !slices.Equal(c.Lineage[:len(c.Lineage)-1], p.Lineage) || !slices.Equal(tok.Lineage, c.Lineage) || tok.Transaction != p.Transaction {
		t.Fatalf("lineage %v of %v", c.Lineage, p.Lineage)
	}
	if tok.Root() != p.Lineage[0].Identity {
		t.Fatalf("root %s of %s", tok.Root(), p.Lineage[0].Identity)
	}
}

// reseal changes the payload of a token and signs it again.
func reseal(t *testing.T, raw string, key crypto.Signer, header, payload func(map[string]any)) token.Secret {
	t.Helper()
	parts := strings.Split(raw, ".")
	for i, change := range []func(map[string]any){header, payload} {
		if change == nil {
			continue
		}
		b, err := base64.RawURLEncoding.DecodeString(parts[i])
		if err != nil {
			t.Fatal(err)
		}
		m := map[string]any{}
		d := json.NewDecoder(strings.NewReader(string(b)))
		d.UseNumber()
		if err := d.Decode(&m); err != nil {
			t.Fatal(err)
		}
		change(m)
		if b, err = json.Marshal(m); err != nil {
			t.Fatal(err)
		}
		parts[i] = base64.RawURLEncoding.EncodeToString(b)
	}
	return token.NewSecret(parts[0] + "." + parts[1] + "." + signES256(t, key, parts[0]+"."+parts[1]))
}

// forge signs claims of one's own choice with a key of the broker: what a thief of the
// key can do.
func (w *world) forge(change func(*token.Claims), like token.Secret) token.Secret {
	w.t.Helper()
	tok, err := token.Inspect(like.Reveal())
	if err != nil {
		w.t.Fatal(err)
	}
	change(&tok.Claims)
	u, err := token.Encode(&tok.Claims, token.ES256)
	if err != nil {
		w.t.Fatal(err)
	}
	s, err := u.Sign(w.key)
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

func signES256(t *testing.T, key crypto.Signer, input string) string {
	t.Helper()
	der, err := crypto.SignMessage(key, rand.Reader, []byte(input), crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	return base64.RawURLEncoding.EncodeToString(rawSignature(t, der))
}

// What may be presented, and what is refused and why.
func TestExchangeRefusals(t *testing.T) {
	w := newWorld(t)
	orders := w.caller("orders")
	w.policy.names[orders.ID] = "orders"
	issued := func(audience string) token.Secret { return w.issue(w.caller("payments"), audience).Token }
	stranger := newKey(t)
	dfy := func(change func(map[string]any)) func(map[string]any) {
		return func(m map[string]any) { change(m["dfy"].(map[string]any)) }
	}
	for _, tc := range []struct {
		name    string
		subject func(t *testing.T) token.Secret
		want    *broker.Refusal
	}{
		{"addressed to its name", func(*testing.T) token.Secret { return issued("orders") }, nil},
		{"addressed to its SPIFFE ID", func(*testing.T) token.Secret { return issued(orders.ID.String()) }, nil},
		{"none", func(*testing.T) token.Secret { return token.Secret{} }, broker.ErrSubjectMalformed},
		{"no token at all", func(*testing.T) token.Secret { return token.NewSecret("hunter2") }, broker.ErrSubjectMalformed},
		{"for somebody else", func(*testing.T) token.Secret { return issued("ledger") }, broker.ErrSubjectNotAddressed},
		{"for somebody with a longer name", func(*testing.T) token.Secret { return issued("orders2") }, broker.ErrSubjectNotAddressed},
		{"revoked by grant", func(*testing.T) token.Secret {
			c := w.issue(w.caller("payments"), "orders")
			w.revoke(broker.LockNone, revocation.Grant(c.Grant.ID()))
			return c.Token
		}, broker.ErrSubjectRevoked},
		{"revoked by its SVID", func(*testing.T) token.Secret {
			c := w.issue(w.caller("payments"), "orders")
			w.revoke(broker.LockNone, revocation.SVID(c.Grant.Lineage[0].SVID))
			return c.Token
		}, broker.ErrSubjectRevoked},
		{"tampered", func(t *testing.T) token.Secret {
			s := issued("orders").Reveal()
			other := reseal(t, s, w.key, nil, func(m map[string]any) { m["scope"] = "admin" })
			return token.NewSecret(strings.Join([]string{strings.Split(s, ".")[0], strings.Split(other.Reveal(), ".")[1], strings.Split(s, ".")[2]}, "."))
		}, broker.ErrSubjectSignature},
		{"signed by a stranger under our kid", func(t *testing.T) token.Secret { return reseal(t, issued("orders").Reveal(), stranger, nil, nil) }, broker.ErrSubjectSignature},
		{"signed by a stranger", func(t *testing.T) token.Secret {
			u, public := w.unsigned(t, issued("orders"), stranger.Public())
			_ = public
			s, err := u.Sign(stranger)
			if err != nil {
				t.Fatal(err)
			}
			return s
		}, broker.ErrSubjectKeyUnknown},
		{"alg none", func(t *testing.T) token.Secret {
			s := reseal(t, issued("orders").Reveal(), w.key, func(m map[string]any) { m["alg"] = "none" }, nil).Reveal()
			return token.NewSecret(s[:strings.LastIndex(s, ".")+1])
		}, broker.ErrSubjectMalformed},
		{"alg none, with a signature", func(t *testing.T) token.Secret {
			return reseal(t, issued("orders").Reveal(), w.key, func(m map[string]any) { m["alg"] = "none" }, nil)
		}, broker.ErrSubjectMalformed},
		{"HS256 with the public key", func(t *testing.T) token.Secret {
			s := reseal(t, issued("orders").Reveal(), w.key, func(m map[string]any) { m["alg"] = "HS256" }, nil).Reveal()
			input := s[:strings.LastIndex(s, ".")]
			der, err := x509.MarshalPKIXPublicKey(w.public.Key)
			if err != nil {
				t.Fatal(err)
			}
			mac := hmac.New(sha256.New, der)
			mac.Write([]byte(input))
			return token.NewSecret(input + "." + base64.RawURLEncoding.EncodeToString(mac.Sum(nil)))
		}, broker.ErrSubjectMalformed},
		{"jku", func(t *testing.T) token.Secret {
			return reseal(t, issued("orders").Reveal(), w.key, func(m map[string]any) { m["jku"] = "https://evil.example/jwks" }, nil)
		}, broker.ErrSubjectMalformed},
		{"an embedded key", func(t *testing.T) token.Secret {
			return reseal(t, issued("orders").Reveal(), stranger, func(m map[string]any) { m["jwk"] = map[string]any{"kty": "EC"} }, nil)
		}, broker.ErrSubjectMalformed},
		{"another typ", func(t *testing.T) token.Secret {
			return reseal(t, issued("orders").Reveal(), w.key, func(m map[string]any) { m["typ"] = "JWT" }, nil)
		}, broker.ErrSubjectMalformed},
		{"an unknown dfy field", func(t *testing.T) token.Secret {
			return reseal(t, issued("orders").Reveal(), w.key, nil, dfy(func(m map[string]any) { m["admin"] = true }))
		}, broker.ErrSubjectMalformed},
		{"two audiences", func(t *testing.T) token.Secret {
			return reseal(t, issued("orders").Reveal(), w.key, nil, func(m map[string]any) { m["aud"] = []string{"orders", "ledger"} })
		}, broker.ErrSubjectMalformed},
		{"another issuer", func(*testing.T) token.Secret {
			return w.forge(func(c *token.Claims) { c.Issuer = "https://other.example" }, issued("orders"))
		}, broker.ErrSubjectMalformed},
		{"not valid yet", func(*testing.T) token.Secret {
			return w.forge(func(c *token.Claims) {
				c.IssuedAt, c.NotBefore, c.Expires = noon.Add(10*time.Minute), noon.Add(10*time.Minute), noon.Add(15*time.Minute)
			}, issued("orders"))
		}, broker.ErrSubjectMalformed},
		{"forged with the real key, a new grant", func(t *testing.T) token.Secret {
			g, err := token.NewGrantID(id("payments"), noon, rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			return w.forge(func(c *token.Claims) { c.Lineage[0].Grant = g }, issued("orders"))
		}, broker.ErrSubjectUnknown},
		{"forged with the real key, a grant on record", func(*testing.T) token.Secret {
			return w.forge(func(c *token.Claims) { c.Scopes = []string{"admin"} }, issued("orders"))
		}, broker.ErrSubjectUnknown},
		{"forged: rev above the head", func(*testing.T) token.Secret {
			return w.forge(func(c *token.Claims) { c.Position.Rev += 1000 }, issued("orders"))
		}, broker.ErrSubjectUnknown},
		{"forged: a position off the log", func(*testing.T) token.Secret {
			return w.forge(func(c *token.Claims) { c.Position.Sum[0] ^= 1 }, issued("orders"))
		}, broker.ErrSubjectUnknown},
		{"of an earlier era", func(*testing.T) token.Secret {
			return w.forge(func(c *token.Claims) { c.Position.Era-- }, issued("orders"))
		}, broker.ErrSubjectRevoked},
		{"expired", func(*testing.T) token.Secret {
			s := issued("orders")
			w.clock.advance(broker.DefaultTTL)
			return s
		}, broker.ErrSubjectExpired},
		{"signed by a revoked key", func(*testing.T) token.Secret {
			s := issued("orders")
			w.revoke(broker.LockNone, revocation.Key(w.public.ID))
			w.newKey()
			return s
		}, broker.ErrSubjectRevoked},
		{"root quarantined", func(*testing.T) token.Secret {
			s := issued("orders")
			w.revoke(broker.LockQuarantine, revocation.Identity(id("payments")))
			return s
		}, broker.ErrSubjectRevoked},
	} {
		t.Run(tc.name, func(t *testing.T) {
			subject := tc.subject(t)
			w.secrets = append(w.secrets, subject)
			cred, err := w.b.Exchange(ctx, orders, broker.Request{Audience: "far", Subject: subject})
			if tc.want == nil {
				if g := w.got(cred, err).Grant; g.Lineage[0].Identity != id("payments") || g.Presenter() != orders.ID || w.last().Parent == "" {
					t.Errorf("got %+v", g)
				}
				return
			}
			refused(t, err, tc.want)
			e := w.last()
			if e.Outcome != "refused" || e.Reason != tc.want.Reason || e.Actor != orders.ID.String() {
				t.Errorf("audit: %+v", e)
			}
			if e.Alert != (tc.want == broker.ErrSubjectUnknown) {
				t.Errorf("alert %t", e.Alert)
			}
		})
	}
}

// unsigned makes the token again for another key.
func (w *world) unsigned(t *testing.T, like token.Secret, key crypto.PublicKey) (token.Unsigned, token.PublicKey) {
	t.Helper()
	tok, err := token.Inspect(like.Reveal())
	if err != nil {
		t.Fatal(err)
	}
	public, err := token.NewPublicKey(token.ES256, key)
	if err != nil {
		t.Fatal(err)
	}
	tok.Lineage[0].Key = public.ID
	u, err := token.Encode(&tok.Claims, token.ES256)
	if err != nil {
		t.Fatal(err)
	}
	return u, public
}

// Any member of the chain, revoked by any selector that names it, takes along all that
// derives from it, here and at a verifier, and nothing else.
func TestDeadAncestor(t *testing.T) {
	for _, tc := range []struct {
		name     string
		selector func(chain []*broker.Credential) revocation.Selector
		dead     [3]bool
	}{
		{"the root's identity", func([]*broker.Credential) revocation.Selector { return revocation.Identity(id("a")) }, [3]bool{true, true, true}},
		{"the middle's identity", func([]*broker.Credential) revocation.Selector { return revocation.Identity(id("b")) }, [3]bool{false, true, true}},
		{"the last's identity", func([]*broker.Credential) revocation.Selector { return revocation.Identity(id("c")) }, [3]bool{false, false, true}},
		{"the root's grant", func(c []*broker.Credential) revocation.Selector { return revocation.Grant(c[0].Grant.ID()) }, [3]bool{true, true, true}},
		{"the middle's grant", func(c []*broker.Credential) revocation.Selector { return revocation.Grant(c[1].Grant.ID()) }, [3]bool{false, true, true}},
		{"the middle's SVID", func(c []*broker.Credential) revocation.Selector { return revocation.SVID(c[1].Grant.Lineage[1].SVID) }, [3]bool{false, true, true}},
		{"another's", func([]*broker.Credential) revocation.Selector { return revocation.Identity(id("aa")) }, [3]bool{}},
		{"everything", func([]*broker.Credential) revocation.Selector { return revocation.Everything() }, [3]bool{true, true, true}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			to := func(s string) string { return id(s).String() }
			var chain []*broker.Credential
			chain = append(chain, w.issue(w.caller("a"), to("b")))
			chain = append(chain, w.exchange(w.caller("b"), chain[0].Token, to("c")))
			chain = append(chain, w.exchange(w.caller("c"), chain[1].Token, to("d")))
			req := broker.Revoke{Selectors: []revocation.Selector{tc.selector(chain)}, Lock: broker.LockNone, Reason: "test", AllowEverything: true}
			_, err := w.b.Revoke(ctx, w.operator(), req)
			if pending := (*broker.Pending)(nil); errors.As(err, &pending) {
				_, err = w.b.Revoke(ctx, w.caller("second-operator"), req)
			}
			if err != nil {
				t.Fatal(err)
			}
			presenters := []spiffeid.ID{id("b"), id("c"), id("d")}
			for i, cred := range chain {
				if v := w.verdict(cred.Token); (v == revocation.Revoked) != tc.dead[i] {
					t.Errorf("credential %d is %s at a verifier", i, v)
				}
				if s, _ := w.b.GrantState(cred.Grant); (s == broker.GrantRevoked) != tc.dead[i] {
					t.Errorf("grant %d is %s", i, s)
				}
				_, err := w.b.Exchange(ctx, w.callerWith(presenters[i], spiffeOptions), broker.Request{Audience: "far", Subject: cred.Token})
				if errors.Is(err, broker.ErrSubjectRevoked) != tc.dead[i] {
					t.Errorf("exchanging credential %d: %v", i, err)
				}
			}
		})
	}
}

// TestSignatureOnce: what is remembered of a presented token is that its signature holds,
// for its very bytes and as long as the key is the same. Everything else is asked anew.
func TestSignatureOnce(t *testing.T) {
	w := newWorld(t)
	orders := w.caller("orders")
	w.policy.names[orders.ID] = "orders"
	cred, other := w.issue(w.caller("payments"), "orders"), w.issue(w.caller("payments"), "orders")
	exchange := func(s token.Secret) error {
		_, err := w.b.Exchange(ctx, orders, broker.Request{Audience: "ledger", Subject: s})
		return err
	}
	for _, c := range []*broker.Credential{cred, other} {
		if err := exchange(c.Token); err != nil {
			t.Fatal(err)
		}
	}
	if n := w.b.Remembered(); n != 2 {
		t.Fatalf("%d tokens are remembered, want 2", n)
	}
	raw, otherRaw := cred.Token.Reveal(), other.Token.Reveal()
	input, signature := cutLast(raw)
	_, otherSignature := cutLast(otherRaw)
	flipped := []byte(signature)
	flipped[3] ^= 1
	for name, forged := range map[string]string{
		"another's signature": input + "." + otherSignature,
		"one bit":             input + "." + string(flipped),
		"noise":               input + "." + base64.RawURLEncoding.EncodeToString(make([]byte, 64)),
	} {
		for range 2 {
			if err := exchange(token.NewSecret(forged)); !errors.Is(err, broker.ErrSubjectSignature) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	if n := w.b.Remembered(); n != 2 {
		t.Errorf("%d tokens are remembered after forgeries, want 2", n)
	}

	// What a caller does with the answer is nobody else's.
	got, err := w.b.Introspect(ctx, orders, cred.Token)
	if err != nil || !got.Active() {
		t.Fatal(got, err)
	}
	got.Claims.Scopes = append(got.Claims.Scopes[:0], "admin")
	got.Claims.Lineage[0].Identity = id("somebody")
	again, err := w.b.Introspect(ctx, orders, cred.Token)
	if err != nil || again.Claims.Root() != id("payments") || slices.Contains(again.Claims.Scopes, "admin") {
		t.Errorf("it says %+v, %v", again.Claims, err)
	}

	w.revoke(broker.LockNone, revocation.Grant(cred.Grant.ID()))
	if err := exchange(cred.Token); !errors.Is(err, broker.ErrSubjectRevoked) {
		t.Errorf("revoked: %v", err)
	}
	// Another key of the same ID vouches for nothing that this one did.
	restore := w.b.SwapKey(w.public.ID, newKey(t).Public())
	if err := exchange(other.Token); !errors.Is(err, broker.ErrSubjectSignature) {
		t.Errorf("under another key of that ID: %v", err)
	}
	restore()
	if err := exchange(other.Token); err != nil {
		t.Error(err)
	}
	w.clock.advance(broker.DefaultTTL)
	if err := exchange(other.Token); !errors.Is(err, broker.ErrSubjectExpired) {
		t.Errorf("expired: %v", err)
	}
	if err := w.b.Prune(ctx); err != nil || w.b.Remembered() != 0 {
		t.Errorf("%d tokens are remembered after their time, %v", w.b.Remembered(), err)
	}
}

func cutLast(raw string) (input, signature string) {
	dot := strings.LastIndexByte(raw, '.')
	return raw[:dot], raw[dot+1:]
}
