package policy

// ParseData is the data parser on one file.
func ParseData(name string, content []byte) Problems {
	var problems Problems
	parseData([]string{name}, map[string][]byte{name: content}, &problems)
	return problems
}
