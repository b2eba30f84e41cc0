// Package supervise runs a program beside its credentials: it waits until they are there,
// hands them over in the program's environment and in files, and does as it was told when
// they are renewed, revoked or expired. "dayfly exec" and "dayfly-agent exec" are both this
// package; who keeps the credentials fresh is a Keeper.
//
//	code, err := supervise.Run(ctx, supervise.Config{Spec: spec, Keeper: supervise.OfAgent(a), Program: args})
//
// What it keeps to:
//
//   - The program isn't started without all that it was promised.
//   - A credential is in the environment or in a file of the program, and nowhere else: in
//     no argument, no log, no error.
//   - Whatever signal reaches the supervisor reaches the program once, and its exit code is
//     the supervisor's.
//   - The folder of files goes with the supervisor; what a killed one left goes with the
//     next start.
package supervise
