package agent

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"time"
)

const (
	// quietFor is how long a warning that repeats itself is kept back.
	quietFor = time.Minute
	// maxQuiet bounds the warnings that are remembered; beyond it, all are forgotten.
	maxQuiet = 512
)

// QuietLog returns a handler that passes on what a failure says the first time, and from
// then on at most once a minute, with the number of those kept back meanwhile as
// "repeated". Two warnings are the same if their message and their texts are, but for
// digits; numbers, times and durations may differ.
func QuietLog(next slog.Handler) slog.Handler {
	return &quiet{next: next, said: &said{at: map[string]*saying{}}}
}

type quiet struct {
	next slog.Handler
	said *said
	with string // of WithAttrs and WithGroup
}

// said is shared by all handlers made of one.
type said struct {
	mu sync.Mutex
	at map[string]*saying
}

type saying struct {
	last     time.Time
	repeated int
}

func (q *quiet) Enabled(ctx context.Context, level slog.Level) bool {
	return q.next.Enabled(ctx, level)
}

func (q *quiet) Handle(ctx context.Context, r slog.Record) error {
	if r.Level < slog.LevelWarn {
		return q.next.Handle(ctx, r)
	}
	var key strings.Builder
	key.WriteString(q.with + "\x00" + r.Message)
	r.Attrs(func(a slog.Attr) bool {
		key.WriteString(text(a))
		return true
	})
	repeated, speak := q.said.may(key.String(), r.Time)
	if !speak {
		return nil
	}
	if repeated > 0 {
		r = r.Clone()
		r.AddAttrs(slog.Int("repeated", repeated))
	}
	return q.next.Handle(ctx, r)
}

// may says whether to speak, and how often it was not since the last time.
func (s *said) may(key string, now time.Time) (repeated int, speak bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	one, ok := s.at[key]
	if !ok {
		if len(s.at) >= maxQuiet {
			clear(s.at)
		}
		s.at[key] = &saying{last: now}
		return 0, true
	}
	if since := now.Sub(one.last); since >= 0 && since < quietFor {
		one.repeated++
		return 0, false
	}
	repeated, one.last, one.repeated = one.repeated, now, 0
	return repeated, true
}

// text is what makes an attribute differ from another.
func text(a slog.Attr) string {
	switch v := a.Value.Resolve(); v.Kind() {
	case slog.KindString, slog.KindAny, slog.KindGroup:
		return "\x00" + a.Key + "=" + strings.Map(undigit, v.String())
	}
	return ""
}

// undigit makes ports and pids of one kind.
func undigit(r rune) rune {
	if r >= '0' && r <= '9' {
		return '0'
	}
	return r
}

func (q *quiet) WithAttrs(attrs []slog.Attr) slog.Handler {
	with := q.with
	for _, a := range attrs {
		with += text(a)
	}
	return &quiet{q.next.WithAttrs(attrs), q.said, with}
}

func (q *quiet) WithGroup(name string) slog.Handler {
	return &quiet{q.next.WithGroup(name), q.said, q.with + "\x00" + name}
}
