package gate

import "sync"

// Bounds of connections that have proved who they are.
type Bounds struct {
	// OfOne bounds those of one identity, All those of all of them.
	OfOne, All int
	// Reserved come on top, for identities that have none: an operator gets through
	// whatever others hold.
	Reserved int
}

// Proven counts the connections that have proved an identity. A gate has no say over
// them: a stranger can't have them closed. Its methods may be called at once.
type Proven struct {
	bounds  Bounds
	mu      sync.Mutex
	byID    map[string]int
	all     int
	refused uint64
}

// NewProven returns a count of no connections.
func NewProven(b Bounds) *Proven { return &Proven{bounds: b, byID: map[string]int{}} }

// Enter counts a connection of an identity until leave is called; twice is once. It is
// not ok for an identity that has too many, or when all together have.
func (p *Proven) Enter(id string) (leave func(), ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	limit := p.bounds.All
	if p.byID[id] == 0 {
		limit += p.bounds.Reserved
	}
	if p.byID[id] >= p.bounds.OfOne || p.all >= limit {
		p.refused++
		return nil, false
	}
	p.byID[id]++
	p.all++
	return sync.OnceFunc(func() { p.leave(id) }), true
}

func (p *Proven) leave(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.all--
	if p.byID[id]--; p.byID[id] == 0 {
		delete(p.byID, id)
	}
}

// Len is how many are counted.
func (p *Proven) Len() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.all
}

// Refused is how many were one too many.
func (p *Proven) Refused() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.refused
}
