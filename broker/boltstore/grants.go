package boltstore

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/token"
	"go.etcd.io/bbolt"
)

const (
	grantIDSize = 18
	daySize     = len(dayLayout)
	// grantFill is how full a page stays that splits. Who has many grants a day adds each
	// behind the last, and no page before it is filled up any more; who has few adds them
	// anywhere, and what is left nearly full splits again too soon. Half takes 2.1 times the
	// records for the first and 1.6 for the second, nine tenths 1.4 and 2.4, this 1.6 and 1.7.
	grantFill = 0.7
	// scanned bounds the grants that one read transaction looks at.
	scanned = 2048
)

// Issue implements broker.Store. A position below the horizon is off the log: the
// records beyond it are no longer all there.
func (s *Store) Issue(ctx context.Context, g *broker.Grant, admit func([]broker.Record) error) error {
	value, err := encodeGrant(g)
	if err != nil {
		return fmt.Errorf("issuing: %w", err)
	}
	id, day, at := g.ID(), dayOf(g.Expires), g.Position
	return s.do(ctx, &op{tier: tierIssue, bytes: len(value), apply: func(t *txn) error {
		newer, err := t.beyond(at)
		if err != nil {
			return err
		}
		if err := admit(newer); err != nil {
			return err
		}
		return t.putGrant(day, id, value)
	}})
}

func (t *txn) putGrant(day string, id token.GrantID, value []byte) error {
	grants := t.tx.Bucket(bucketGrants)
	if found, _ := findGrant(grants, id); found != nil {
		return fmt.Errorf("issuing: grant %s is in the records already", id)
	}
	bucket, err := grants.CreateBucketIfNotExists([]byte(day))
	if err == nil {
		bucket.FillPercent = grantFill
		err = bucket.Put(id.Bytes(), value)
	}
	if err != nil {
		return fmt.Errorf("issuing: %w", err)
	}
	return nil
}

// Grant implements broker.Store.
func (s *Store) Grant(ctx context.Context, id token.GrantID) (g *broker.Grant, err error) {
	err = s.view(ctx, func(tx *bbolt.Tx) error {
		value, day := findGrant(tx.Bucket(bucketGrants), id)
		if value == nil {
			value, day = searchGrant(tx.Bucket(bucketGrants), id)
		}
		if value == nil {
			return broker.ErrNotFound
		}
		var err error
		g, err = grantAt([]byte(day), id.Bytes(), value)
		return err
	})
	return g, err
}

// findGrant looks where a grant should be: an ID tells the time at which it was
// made, and a grant expires within the hour. A day before is looked at, too, for
// clocks that were set.
func findGrant(grants *bbolt.Bucket, id token.GrantID) (value []byte, day string) {
	made := madeAt(id)
	for _, days := range []int{0, 1, -1} {
		day := dayOf(made.AddDate(0, 0, days))
		if b := grants.Bucket([]byte(day)); b != nil {
			if v := b.Get(id.Bytes()); v != nil {
				return v, day
			}
		}
	}
	return nil, ""
}

// searchGrant looks everywhere: there is a bucket for each of some 30 days.
func searchGrant(grants *bbolt.Bucket, id token.GrantID) (value []byte, day string) {
	c := grants.Cursor()
	for k, _ := c.First(); k != nil; k, _ = c.Next() {
		if v := grants.Bucket(k).Get(id.Bytes()); v != nil {
			return v, string(k)
		}
	}
	return nil, ""
}

// madeAt reads the time in an ID.
func madeAt(id token.GrantID) time.Time {
	b := id.Bytes()
	var ms [8]byte
	copy(ms[2:], b[5:11])
	return time.UnixMilli(int64(binary.BigEndian.Uint64(ms[:]))).UTC()
}

// grantAt decodes what is stored at a place, and checks that it belongs there.
func grantAt(day, key, value []byte) (*broker.Grant, error) {
	g, err := decodeGrant(value)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: grant %x of %s: %w", ErrCorrupt, key, day, err)
	case !bytes.Equal(g.ID().Bytes(), key):
		return nil, fmt.Errorf("%w: grant %x of %s is %s", ErrCorrupt, key, day, g.ID())
	case dayOf(g.Expires) != string(day):
		return nil, fmt.Errorf("%w: grant %s of %s expires on %s", ErrCorrupt, g.ID(), day, dayOf(g.Expires))
	}
	return g, nil
}

// A place is where a scan of the grants stands: behind a grant of a day.
type place struct {
	day string
	key []byte // nil: before the day's first
}

// Grants implements broker.Store.
func (s *Store) Grants(ctx context.Context, q broker.GrantQuery) ([]*broker.Grant, string, error) {
	if q.Limit < 1 {
		return nil, "", errors.New("a page of grants has a limit of at least 1")
	}
	at, err := parsePage(q.After)
	if err != nil {
		return nil, "", err
	}
	sc := &scan{query: q, at: at}
	for !sc.end {
		if err := s.view(ctx, sc.step); err != nil {
			return nil, "", err
		}
	}
	if len(sc.found) <= q.Limit {
		return sc.found, "", nil
	}
	last := sc.found[q.Limit-1]
	return sc.found[:q.Limit], pageAfter(last), nil
}

// A scan collects one grant more than a page, to know whether there is another.
type scan struct {
	query broker.GrantQuery
	at    place
	found []*broker.Grant
	end   bool
}

// step goes on in a transaction of its own.
func (sc *scan) step(tx *bbolt.Tx) error {
	grants := tx.Bucket(bucketGrants)
	days := grants.Cursor()
	budget := scanned
	for day, _ := days.Seek([]byte(sc.at.day)); day != nil; day, _ = days.Next() {
		if string(day) != sc.at.day {
			sc.at = place{day: string(day)}
		}
		expired, err := sc.expired(day)
		if err != nil {
			return err
		}
		if expired {
			continue
		}
		if err := sc.day(day, grants.Bucket(day), &budget); err != nil || sc.end || budget == 0 {
			return err
		}
	}
	sc.end = true
	return nil
}

// expired reports whether nothing of a day can be live.
func (sc *scan) expired(day []byte) (bool, error) {
	if sc.query.LiveAt.IsZero() {
		return false, nil
	}
	end, err := dayEnd(day)
	return !end.After(sc.query.LiveAt), err
}

func (sc *scan) day(day []byte, b *bbolt.Bucket, budget *int) error {
	var prefix []byte
	if !sc.query.Presenter.IsZero() {
		p := token.PresenterPrefix(sc.query.Presenter)
		prefix = p[:]
	}
	c := b.Cursor()
	from := prefix
	if bytes.Compare(sc.at.key, from) >= 0 {
		from = sc.at.key
	}
	k, v := c.Seek(from)
	if k != nil && bytes.Equal(k, sc.at.key) {
		k, v = c.Next()
	}
	for ; k != nil && bytes.HasPrefix(k, prefix); k, v = c.Next() {
		g, err := grantAt(day, k, v)
		if err != nil {
			return err
		}
		sc.at.key = bytes.Clone(k)
		if sc.wants(g) {
			sc.found = append(sc.found, g)
			if sc.end = len(sc.found) > sc.query.Limit; sc.end {
				return nil
			}
		}
		if *budget--; *budget == 0 {
			return nil
		}
	}
	return nil
}

func (sc *scan) wants(g *broker.Grant) bool {
	q := sc.query
	return (q.LiveAt.IsZero() || g.Expires.After(q.LiveAt)) &&
		(q.Presenter.IsZero() || g.Presenter() == q.Presenter) &&
		(q.Match == nil || q.Match(g))
}

// pageAfter makes the token of the page behind a grant: its day and its ID.
func pageAfter(g *broker.Grant) string {
	return base64.RawURLEncoding.EncodeToString(append([]byte(dayOf(g.Expires)), g.ID().Bytes()...))
}

func parsePage(s string) (place, error) {
	if s == "" {
		return place{}, nil
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(s) // which skips line ends
	if err != nil || len(b) != daySize+grantIDSize || len(s) != base64.RawURLEncoding.EncodedLen(len(b)) {
		return place{}, broker.ErrBadPage
	}
	if _, err := dayEnd(b[:daySize]); err != nil {
		return place{}, broker.ErrBadPage
	}
	return place{day: string(b[:daySize]), key: b[daySize:]}, nil
}
