// Package boottime reads the clock that staleness and ages are measured with: elapsed
// time that runs on while the machine sleeps, which Go's monotonic clock does not.
package boottime
