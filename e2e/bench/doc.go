// Command bench measures dayfly against its floors. Every row of its table is a figure of
// the built commands, in processes of their own, over real mTLS and on a real disk, beside
// the least that the same job can cost: a floor, measured in the same run, in turns with
// ours. What is judged is the median of the ratios, so that a noisy machine moves both.
//
// The rows are data ([rowsOf]); what they need is made when the first of them runs, and
// ended when the last one has. This process is the load. Floors that serve are processes
// too, of this very binary ("bench floor").
//
//	go run ./e2e/bench run                          # make bench
//	go run ./e2e/bench run --size large             # make bench-large
//	go run ./e2e/bench run --row '^issue' --output json
//	go run ./e2e/bench profile --row '^issue/64'    # make profile ROW=...
package main
