// Command hello is the least that a gRPC server with mTLS can be: the floor of what a
// daemon's binary and memory are compared with. It answers health checks until its
// standard input ends.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "hello:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 1 {
		return errors.New("want the folder with svid.pem, key.pem and bundle.pem")
	}
	cert, err := tls.LoadX509KeyPair(filepath.Join(args[0], "svid.pem"), filepath.Join(args[0], "key.pem"))
	if err != nil {
		return err
	}
	bundle, err := os.ReadFile(filepath.Join(args[0], "bundle.pem"))
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(bundle) {
		return errors.New("no certificate in bundle.pem")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: roots, MinVersion: tls.VersionTLS13,
	})))
	healthpb.RegisterHealthServer(s, health.NewServer())
	fmt.Printf("{\"grpc\":%q}\n", l.Addr())
	go func() { _, _ = io.Copy(io.Discard, os.Stdin); s.Stop() }()
	return s.Serve(l)
}
