// Package agent is the sidecar: it stands beside one workload, has that workload's
// SVID and nothing of its own, and gives credentials over unix sockets, from memory.
//
//	a, err := agent.New(agent.Config{
//		Upstream: client.Conn(), // *sdk.Client: the broker, whose SPIFFE ID is pinned
//		Identity: identity,      // *agent.Identity: the Workload API
//		GRPC:     grpcSocket,    // from agent.Listen
//		HTTP:     httpSocket,
//	})
//	if err != nil { ... }
//	return a.Run(ctx)
//
// What it keeps to:
//
//   - A credential is renewed at a random point of 35 to 50 % of its life, before
//     anyone asks, one call at a time; while the broker is away, what is still valid
//     is served.
//   - What the feed says is revoked is not served from the moment that the agent has
//     applied the record: every credential is judged each time it is given out.
//   - The feed is relayed with the age of the agent's own knowledge added, never
//     younger. A verifier below is answered only from a proof that was asked for after
//     the report that names it: the broker's roster knows of everyone who can be fresh.
//   - Who may ask is said by the socket's mode and by the kernel's peer credentials.
package agent
