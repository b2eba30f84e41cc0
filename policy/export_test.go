package policy

// ParseData is the data parser on one file.
func ParseData(name string, content []byte) Problems {
	var problems Problems
	parseData([]string{name}, map[string][]byte{name: content}, &problems)
	return problems
}

// MatchPattern says whether policy data with an entry for pattern finds it for
// one of patterns.
func CheckPattern(pattern string) error { return checkPattern(pattern) }
