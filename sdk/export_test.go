package sdk

import "time"

// SetWall sets the wall clock that the source reads, by so much: no time.Time can be made
// whose two clocks differ.
func (s *TokenSource) SetWall(by time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	read := s.now
	s.now = func() moment {
		m := read()
		m.wall = m.wall.Add(by)
		return m
	}
}
