package outgoing

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
)

const (
	// secretMode is the most that a secret's file may allow: its owner, and a group to read.
	secretMode fs.FileMode = 0o640
	// minSecret and maxSecret are its length: less can be guessed, more fits no URL.
	minSecret, maxSecret = 16, 512
)

// A secret is what callers on loopback must show. It opens this proxy and nothing else.
type secret struct{ sum [sha256.Size]byte }

// loadSecret reads the file, or makes it, for its owner alone. It stays when the agent ends:
// programs that have read it go on after a restart.
func loadSecret(path string) (*secret, error) {
	text, err := readSecret(path)
	if errors.Is(err, fs.ErrNotExist) {
		if err = makeSecret(path); err == nil {
			text, err = readSecret(path)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("secret_file %s: %w", path, err)
	}
	return &secret{sha256.Sum256([]byte(text))}, nil
}

func readSecret(path string) (string, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() { // looked at before: opening a pipe would wait
		return "", errors.New("is no plain file")
	}
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	opened, err := f.Stat()
	switch {
	case err != nil:
		return "", err
	case !os.SameFile(info, opened):
		return "", errors.New("changes while it is read")
	case !ours(opened):
		return "", errors.New("belongs to another user, who may know it: it must be root's or the agent's")
	case opened.Mode().Perm()&^secretMode != 0:
		return "", fmt.Errorf("mode %04o is wider than %04o: chmod it, and put a new secret into it", opened.Mode().Perm(), secretMode)
	}
	raw, err := io.ReadAll(io.LimitReader(f, maxSecret+2))
	if err != nil {
		return "", err
	}
	text := strings.TrimSpace(string(raw))
	if len(text) < minSecret || len(text) > maxSecret || strings.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r > '~' || r == ':' }) {
		return "", fmt.Errorf("must hold %d to %d plain characters, without spaces and colons", minSecret, maxSecret)
	}
	return text, nil
}

// makeSecret puts a new one in place, whole, unless another process was quicker.
func makeSecret(path string) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".dayfly-") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = io.WriteString(f, rand.Text()+"\n")
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Link(f.Name(), path); !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

// shown reports whether a request shows the secret. To a reverse proxy it may come where
// programs put a password for a server.
func (s *secret) shown(r *http.Request, forward bool) bool {
	sent := r.Header.Values("Proxy-Authorization")
	if !forward {
		sent = append(sent[:len(sent):len(sent)], r.Header.Values("Authorization")...)
	}
	for _, value := range sent {
		if text, ok := password(value); ok {
			sum := sha256.Sum256([]byte(text))
			if subtle.ConstantTimeCompare(sum[:], s.sum[:]) == 1 {
				return true
			}
		}
	}
	return false
}

// password is what Basic (with any user) or Bearer says.
func password(value string) (string, bool) {
	scheme, rest, _ := strings.Cut(value, " ")
	switch {
	case strings.EqualFold(scheme, "Bearer"):
		return rest, true
	case strings.EqualFold(scheme, "Basic"):
		raw, err := base64.StdEncoding.DecodeString(rest)
		_, text, ok := strings.Cut(string(raw), ":")
		return text, err == nil && ok
	}
	return "", false
}
