package policy

import (
	"bytes"
	"compress/gzip"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/bundle"
	"github.com/open-policy-agent/opa/v1/keys"
)

const (
	// maxUnpacked bounds what a bundle unpacks to, in bytes: OPA's reader holds all of
	// it in memory before it looks at the signature, and bounds single files only.
	maxUnpacked = 64 << 20
	// maxRevision bounds the revision that a bundle gives itself: it stands in every
	// record of a decision.
	maxRevision = 64
	// minRSA is the shortest RSA key that may sign policy, in bits.
	minRSA = 2048
	// bundleData is the file of a bundle's data, wherever in it they stood.
	bundleData = "data.json"
)

// fetched is what is known of a bundle beside its content.
type fetched struct {
	raw      []byte
	etag     string
	signedAt int64     // the signature's iat; 0: it has none
	expires  time.Time // the signature's exp; zero: it has none
}

// ParseBundleKey reads a public key that signs bundles, in PEM as openssl writes it:
// RSA of at least 2048 bits, or ECDSA on P-256, P-384 or P-521. The algorithm follows
// from the key and from nothing that a bundle says.
func ParseBundleKey(text []byte) (crypto.PublicKey, error) {
	block, rest := pem.Decode(text)
	switch {
	case block == nil:
		return nil, errors.New("not PEM")
	case strings.Contains(block.Type, "PRIVATE KEY"):
		return nil, errors.New("a private key: it belongs to whoever signs; give the public one (openssl pkey -pubout)")
	case block.Type != "PUBLIC KEY":
		return nil, fmt.Errorf("%s where PUBLIC KEY is wanted", block.Type)
	case len(bytes.TrimSpace(rest)) > 0:
		return nil, errors.New("more than one key in one file")
	}
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	if _, err := bundleAlgorithm(key); err != nil {
		return nil, err
	}
	return key, nil
}

func bundleAlgorithm(key crypto.PublicKey) (string, error) {
	switch key := key.(type) {
	case *rsa.PublicKey:
		if key.N.BitLen() < minRSA {
			return "", fmt.Errorf("an RSA key of %d bits: at least %d", key.N.BitLen(), minRSA)
		}
		return "RS256", nil
	case *ecdsa.PublicKey:
		if alg := map[int]string{256: "ES256", 384: "ES384", 521: "ES512"}[key.Curve.Params().BitSize]; alg != "" {
			return alg, nil
		}
	}
	return "", fmt.Errorf("a key of type %T: OPA signs with RSA, or ECDSA on P-256, P-384 or P-521", key)
}

// verification tells OPA's reader whom to believe.
func verification(public map[string]crypto.PublicKey, scope string) (*bundle.VerificationConfig, error) {
	if len(public) == 0 {
		return nil, errors.New("policy bundle: no key to verify with")
	}
	configs := map[string]*keys.Config{}
	for id, key := range public {
		alg, err := bundleAlgorithm(key)
		if err != nil {
			return nil, fmt.Errorf("policy bundle: key %q: %w", id, err)
		}
		der, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			return nil, fmt.Errorf("policy bundle: key %q: %w", id, err)
		}
		text := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
		configs[id] = &keys.Config{Key: string(text), Algorithm: alg, Scope: scope}
	}
	return bundle.NewVerificationConfig(configs, "", scope, nil), nil
}

// readBundleFile reads a bundle on disk and doesn't look at its signature.
func readBundleFile(path string) (*folder, error) {
	raw, err := readAtMost(path, maxFile)
	if err != nil {
		return nil, fmt.Errorf("reading policy bundle: %w", err)
	}
	return readBundle(raw, nil)
}

func readAtMost(path string, limit int64) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return atMost(file, limit)
}

func atMost(r io.Reader, limit int64) ([]byte, error) {
	raw, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err == nil && int64(len(raw)) > limit {
		return nil, fmt.Errorf("larger than %d bytes", limit)
	}
	return raw, err
}

// readBundle makes of a bundle what a folder would hold. With nil to verify with, no
// signature is needed or looked at.
func readBundle(raw []byte, verify *bundle.VerificationConfig) (*folder, error) {
	if err := checkUnpacked(raw); err != nil {
		return nil, fmt.Errorf("reading policy bundle: %w", err)
	}
	r := bundle.NewReader(bytes.NewReader(raw)).WithSizeLimitBytes(maxFile).WithRegoVersion(ast.RegoV1)
	if verify != nil {
		r = r.WithBundleVerificationConfig(verify)
	} else {
		r = r.WithSkipBundleVerification(true)
	}
	b, err := r.Read()
	if err != nil {
		return nil, fmt.Errorf("reading policy bundle: %w", err)
	}
	f, err := content(&b)
	if err != nil {
		return nil, fmt.Errorf("reading policy bundle: %w", err)
	}
	if verify != nil {
		if f.fetched, err = claims(&b); err != nil {
			return nil, fmt.Errorf("reading policy bundle: %w", err)
		}
		f.fetched.raw = raw
	}
	return f, nil
}

func checkUnpacked(raw []byte) error {
	z, err := gzip.NewReader(bytes.NewReader(raw))
	if err != nil {
		return fmt.Errorf("not a bundle, which is a tar file in gzip: %w", err)
	}
	n, err := io.Copy(io.Discard, io.LimitReader(z, maxUnpacked+1))
	if err != nil {
		return fmt.Errorf("unpacking: %w", err)
	}
	if n > maxUnpacked {
		return fmt.Errorf("unpacks to more than %d bytes", maxUnpacked)
	}
	return nil
}

// content are the files that dayfly's own parsers read. The data are those that the
// signature covers, as OPA read them, and not the bytes of their files: a signature is
// over parsed data, so bytes that OPA reads one way and dayfly another could be signed.
func content(b *bundle.Bundle) (*folder, error) {
	switch rev := b.Manifest.Revision; {
	case b.Type() != bundle.SnapshotBundleType:
		return nil, errors.New("a delta bundle can't be signed: publish whole ones")
	case len(b.WasmModules)+len(b.PlanModules)+len(b.Manifest.WasmResolvers) > 0:
		return nil, errors.New("compiled to wasm or a plan: build with the target rego")
	case rev != "" && !isName(rev) || len(rev) > maxRevision:
		return nil, fmt.Errorf("its revision isn't 1 to %d printable ASCII characters without spaces, quotes and backslashes", maxRevision)
	}
	f := &folder{files: map[string][]byte{}}
	for _, m := range b.Modules {
		f.files[strings.TrimPrefix(m.RelativePath, "/")] = m.Raw
	}
	if len(b.Data) > 0 {
		text, err := json.MarshalIndent(b.Data, "", "  ")
		if err != nil {
			return nil, fmt.Errorf("data: %w", err)
		}
		f.files[bundleData] = text
	}
	f.seal(b.Manifest.Revision)
	return f, nil
}

// claims reads what the signature, which OPA has verified, says of its own time.
func claims(b *bundle.Bundle) (*fetched, error) {
	if len(b.Signatures.Signatures) != 1 {
		return nil, errors.New("not one signature")
	}
	parts := strings.Split(b.Signatures.Signatures[0], ".")
	if len(parts) != 3 {
		return nil, errors.New("the signature is no compact JWS")
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return nil, fmt.Errorf("decoding the signature: %w", err)
	}
	var c struct {
		IssuedAt int64 `json:"iat"`
		Expires  int64 `json:"exp"`
	}
	if err := json.Unmarshal(payload, &c); err != nil {
		return nil, fmt.Errorf("decoding the signature: %w", err)
	}
	if c.IssuedAt < 0 || c.Expires < 0 {
		return nil, errors.New("the signature's iat or exp is negative")
	}
	out := &fetched{signedAt: c.IssuedAt}
	if c.Expires > 0 {
		out.expires = time.Unix(c.Expires, 0).UTC()
	}
	return out, nil
}
