// Package spiffetest is a throwaway SPIFFE trust domain with a real Workload API,
// for tests and for trying things by hand. It holds no secret worth keeping: its
// authorities are born in memory with [New] and gone with [TrustDomain.Close].
//
// Every identity has a Workload API socket of its own, so a process started with
// that address in SPIFFE_ENDPOINT_SOCKET is that identity and can't be another:
//
//	td, err := spiffetest.New(spiffetest.Config{
//		TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"),
//	})
//	if err != nil { ... }
//	defer td.Close()
//	addr, err := td.Workload(spiffeid.RequireFromString("spiffe://example.org/payments"))
//	if err != nil { ... }
//	source, err := workloadapi.NewX509Source(ctx,
//		workloadapi.WithClientOptions(workloadapi.WithAddr(addr)))
//
// SVIDs are replaced at half of their life, as SPIRE does, and pushed to whoever
// has a stream open. The rest of the methods are the accidents of a real
// deployment: a new key ([TrustDomain.Rotate]), a new authority
// ([TrustDomain.RotateCA]), a federated trust domain that comes and goes
// ([TrustDomain.Federate], [TrustDomain.Unfederate]), a registration entry that
// is gone ([TrustDomain.SetDenied]), an agent that is away
// ([TrustDomain.StopSocket]), documents that are expired or not yet valid
// ([TrustDomain.IssueSVID]).
//
// The package listens on unix sockets in a directory of mode 0700 and nowhere
// else. Whoever can reach a socket gets the identity behind it: there is no
// attestation.
//
// Sockets are real I/O, which testing/synctest doesn't see as idle. Inside a
// bubble use [TrustDomain.Source], the same SVIDs and bundles without a socket.
package spiffetest
