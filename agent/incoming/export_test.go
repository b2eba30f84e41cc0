package incoming

// A Finder says what a request needs, or why it is refused.
type Finder func(method, host, path string) (need string, reason string)

// NewFinder returns one for routes. What is needed is "public", or the scopes.
func NewFinder(all []Route) (Finder, error) {
	r, err := newRoutes(all)
	if err != nil {
		return nil, err
	}
	return func(method, host, path string) (string, string) {
		need, no := r.find(method, host, path)
		switch {
		case no != nil:
			return "", no.reason
		case need.public:
			return "public", ""
		}
		out := "token"
		for _, s := range need.scopes {
			out += " " + s
		}
		return out, ""
	}, nil
}

// MustGo and FoldName are for property tests.
var (
	MustGo   = mustGo
	FoldName = foldName
)
