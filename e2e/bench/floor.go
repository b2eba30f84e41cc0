package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/golang-jwt/jwt/v5"
	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"go.etcd.io/bbolt"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// recordBytes is what the floor makes durable for each token.
const recordBytes = 300

// floorFlags are of the hidden command that is a floor's process.
type floorFlags struct {
	workloadAPI, listen, unix, journal string
	tree                               bool
	tokenBytes                         int
}

// floorAnnouncement is the one line that it prints.
type floorAnnouncement struct {
	GRPC string `json:"grpc"`
}

func floorCommand(stdin io.Reader) *cobra.Command {
	var f floorFlags
	cmd := &cobra.Command{
		Use: "floor", Hidden: true, Args: cobra.NoArgs,
		Short: "serve the floors, until standard input ends",
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := sandbox.Lifeline(cmd.Context(), stdin)
			defer cancel()
			return f.serve(ctx, cmd.OutOrStdout())
		},
	}
	fs := cmd.Flags()
	fs.StringVar(&f.workloadAPI, "workload-api", "", "whose SVID to serve with")
	fs.StringVar(&f.listen, "listen", "127.0.0.1:0", "loopback address for gRPC with mTLS")
	fs.StringVar(&f.unix, "unix", "", "path of a socket for gRPC without TLS")
	fs.StringVar(&f.journal, "journal", "", "file of the records")
	fs.BoolVar(&f.tree, "bbolt", false, "it is a bbolt file")
	fs.IntVar(&f.tokenBytes, "token-bytes", 0, "about how long its tokens are")
	return cmd
}

func (f *floorFlags) serve(ctx context.Context, out io.Writer) error {
	svids, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(f.workloadAPI)))
	if err != nil {
		return err
	}
	defer svids.Close()
	open := openJournal
	if f.tree {
		open = openTree
	}
	j, err := open(f.journal)
	if err != nil {
		return err
	}
	defer j.close()
	floor, err := newFloor(j, f.tokenBytes)
	if err != nil {
		return err
	}
	floor.updates = sync.OnceValues(func() (*updates, error) { return openUpdates(f.journal + ".bbolt") })
	cfg := tlsconfig.MTLSServerConfig(svids, svids, tlsconfig.AuthorizeMemberOf(sandbox.TrustDomain))
	cfg.MinVersion = tls.VersionTLS13
	type listener struct {
		net, addr string
		options   []grpc.ServerOption
	}
	listeners := []listener{{"tcp", f.listen, []grpc.ServerOption{grpc.Creds(credentials.NewTLS(cfg))}}}
	if f.unix != "" {
		if err := os.Remove(f.unix); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		listeners = append(listeners, listener{"unix", f.unix, nil})
	}
	group, ctx := errgroup.WithContext(ctx)
	var at floorAnnouncement
	for _, on := range listeners {
		l, err := net.Listen(on.net, on.addr)
		if err != nil {
			return err
		}
		if on.net == "tcp" {
			at.GRPC = l.Addr().String()
		}
		s := grpc.NewServer(on.options...)
		floor.register(s)
		context.AfterFunc(ctx, s.Stop)
		group.Go(func() error { return s.Serve(l) })
	}
	if err := json.NewEncoder(out).Encode(at); err != nil {
		return err
	}
	return group.Wait()
}

// floor does what must be done, and nothing else: no policy, no revocation, no chain.
type floor struct {
	dayflyv1.UnimplementedTokenServiceServer
	dayflyv1.UnimplementedFeedServiceServer

	key     *ecdsa.PrivateKey
	journal *journal
	updates func() (*updates, error) // opened by the first
	padding string

	mu      sync.Mutex
	streams map[chan *dayflyv1.FollowResponse]struct{}
}

func newFloor(j *journal, tokenBytes int) (*floor, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	f := &floor{key: key, journal: j, streams: map[chan *dayflyv1.FollowResponse]struct{}{}}
	bare, err := f.sign()
	if err != nil {
		return nil, err
	}
	f.padding = strings.Repeat("x", max(0, tokenBytes-len(bare))*3/4) // base64 makes 4 of 3
	return f, nil
}

// floorClaims are those of an access token (RFC 9068), without what is ours.
type floorClaims struct {
	jwt.RegisteredClaims
	ClientID string `json:"client_id"`
	Scope    string `json:"scope"`
	Padding  string `json:"pad,omitempty"`
}

func newFloorClaims(padding string) floorClaims {
	now := time.Now()
	return floorClaims{
		RegisteredClaims: jwt.RegisteredClaims{
			Issuer: "https://127.0.0.1:8443", Subject: sandbox.Payments.String(), Audience: jwt.ClaimStrings{"orders"}, ID: rand.Text(),
			IssuedAt: jwt.NewNumericDate(now), NotBefore: jwt.NewNumericDate(now), ExpiresAt: jwt.NewNumericDate(now.Add(time.Hour)),
		},
		ClientID: sandbox.Payments.String(), Scope: "orders.read orders.write", Padding: padding,
	}
}

func signJWT(key *ecdsa.PrivateKey, claims jwt.Claims) (string, error) {
	t := jwt.NewWithClaims(jwt.SigningMethodES256, claims)
	t.Header["typ"], t.Header["kid"] = "at+jwt", "AAAAAAAA"
	return t.SignedString(key)
}

var es256 = jwt.WithValidMethods([]string{"ES256"})

func verifyJWT(key *ecdsa.PublicKey, raw string) (*floorClaims, error) {
	claims := &floorClaims{}
	_, err := jwt.ParseWithClaims(raw, claims, func(*jwt.Token) (any, error) { return key, nil }, es256)
	return claims, err
}

func (f *floor) sign() (string, error) { return signJWT(f.key, newFloorClaims(f.padding)) }

func (f *floor) verify(raw string) (*floorClaims, error) { return verifyJWT(&f.key.PublicKey, raw) }

// Issue signs while the record syncs, as ours does.
func (f *floor) Issue(context.Context, *dayflyv1.IssueRequest) (*dayflyv1.IssueResponse, error) {
	c, err := f.issue()
	return &dayflyv1.IssueResponse{Credential: c}, err
}

// Exchange does so after it has verified a token.
func (f *floor) Exchange(_ context.Context, m *dayflyv1.ExchangeRequest) (*dayflyv1.ExchangeResponse, error) {
	if _, err := f.verify(m.GetSubjectToken()); err != nil {
		return nil, err
	}
	c, err := f.issue()
	return &dayflyv1.ExchangeResponse{Credential: c}, err
}

func (f *floor) issue() (*dayflyv1.Credential, error) {
	type signed struct {
		token string
		err   error
	}
	done := make(chan signed, 1)
	go func() {
		t, err := f.sign()
		done <- signed{t, err}
	}()
	err := f.journal.append(make([]byte, recordBytes))
	s := <-done
	if err := errors.Join(err, s.err); err != nil {
		return nil, err
	}
	now := time.Now()
	return &dayflyv1.Credential{
		Token: s.token, Grant: rand.Text(), Audience: "orders", Scopes: []string{"orders.read", "orders.write"},
		IssuedAt: timestamppb.New(now), ExpiresAt: timestamppb.New(now.Add(time.Hour)),
	}, nil
}

// Follow sends what is fanned out, after a first word.
func (f *floor) Follow(stream grpc.BidiStreamingServer[dayflyv1.FollowRequest, dayflyv1.FollowResponse]) error {
	if _, err := stream.Recv(); err != nil {
		return err
	}
	news := make(chan *dayflyv1.FollowResponse, 4)
	f.mu.Lock()
	f.streams[news] = struct{}{}
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.streams, news)
	}()
	if err := stream.Send(&dayflyv1.FollowResponse{}); err != nil {
		return err
	}
	for {
		select {
		case m := <-news:
			if err := stream.Send(m); err != nil {
				return err
			}
		case <-stream.Context().Done():
			return nil
		}
	}
}

// fanOut sends a message to all streams.
func (f *floor) fanOut(_ context.Context, m *dayflyv1.FollowResponse) (*emptypb.Empty, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for news := range f.streams {
		select {
		case news <- m:
		default:
			return nil, errors.New("a stream doesn't keep up")
		}
	}
	return &emptypb.Empty{}, nil
}

// check verifies a token and says what is in it: introspection without records.
func (f *floor) check(_ context.Context, m *wrapperspb.StringValue) (*wrapperspb.BytesValue, error) {
	claims, err := f.verify(m.GetValue())
	if err != nil {
		return nil, err
	}
	answer, err := json.Marshal(claims)
	return wrapperspb.Bytes(answer), err
}

// update makes a record durable by bbolt: a revoke that decides nothing and tells nobody.
func (f *floor) update(context.Context, *emptypb.Empty) (*emptypb.Empty, error) {
	u, err := f.updates()
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, u.update()
}

var zeros = make([]byte, 64<<10)

// null answers with as many bytes as were asked for.
func (f *floor) null(_ context.Context, m *wrapperspb.UInt32Value) (*wrapperspb.BytesValue, error) {
	return wrapperspb.Bytes(zeros[:m.GetValue()]), nil
}

// Methods for which no service of ours has messages.
const (
	fanOutMethod = "/bench.Floor/FanOut"
	checkMethod  = "/bench.Floor/Check"
	nullMethod   = "/bench.Floor/Null"
	updateMethod = "/bench.Floor/Update"
)

func (f *floor) register(s *grpc.Server) {
	dayflyv1.RegisterTokenServiceServer(s, f)
	dayflyv1.RegisterFeedServiceServer(s, f)
	s.RegisterService(&grpc.ServiceDesc{
		ServiceName: "bench.Floor", HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{method("FanOut", f.fanOut), method("Check", f.check), method("Null", f.null), method("Update", f.update)},
	}, f)
}

func method[In, Out any](name string, serve func(context.Context, *In) (*Out, error)) grpc.MethodDesc {
	return grpc.MethodDesc{MethodName: name, Handler: func(_ any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		in := new(In)
		if err := decode(in); err != nil {
			return nil, err
		}
		return serve(ctx, in)
	}}
}

// A journal keeps records with group commit: one commit carries all that came while the last
// one ran.
type journal struct {
	commit func(records [][]byte) error // of run alone
	file   io.Closer

	mu      sync.Mutex
	waiting []*entry
	more    *sync.Cond
	closed  bool
	done    chan struct{}
}

type entry struct {
	record []byte
	err    error
	done   chan struct{}
}

// openJournal keeps records in a file, with one sync for a commit. Its room is allocated
// ahead, as that of ours: a sync then writes no size.
func openJournal(path string) (*journal, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	var size, allocated int64
	return newJournal(f, func(records [][]byte) error {
		b := bytes.Join(records, nil)
		if size+int64(len(b)) > allocated {
			if err := unix.Fallocate(int(f.Fd()), 0, allocated, allocation); err != nil {
				return err
			}
			allocated += allocation
		}
		if _, err := f.WriteAt(b, size); err != nil {
			return err
		}
		size += int64(len(b))
		return unix.Fdatasync(int(f.Fd())) // as bbolt does
	}), nil
}

// openTree keeps them in a bbolt file.
func openTree(path string) (*journal, error) {
	db, err := openBbolt(path)
	if err != nil {
		return nil, err
	}
	n := 0
	return newJournal(db, func(records [][]byte) error {
		return db.Update(func(tx *bbolt.Tx) error {
			b, err := tx.CreateBucketIfNotExists([]byte("b"))
			for _, r := range records {
				n++
				err = errors.Join(err, b.Put(fmt.Appendf(nil, "%020d", n), r))
			}
			return err
		})
	}), nil
}

// openBbolt opens a file with the options of ours. Its room is allocated ahead, too.
func openBbolt(path string) (*bbolt.DB, error) {
	return bbolt.Open(path, 0o600, &bbolt.Options{NoFreelistSync: true, FreelistType: bbolt.FreelistMapType, InitialMmapSize: allocation, OpenFile: allocated})
}

// allocation is the step in which a file grows.
const allocation = 64 << 20

// allocated opens a file with room to come.
func allocated(path string, flag int, mode os.FileMode) (*os.File, error) {
	f, err := os.OpenFile(path, flag, mode)
	if err != nil {
		return nil, err
	}
	return f, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, allocation)
}

func newJournal(file io.Closer, commit func([][]byte) error) *journal {
	j := &journal{commit: commit, file: file, done: make(chan struct{})}
	j.more = sync.NewCond(&j.mu)
	go j.run()
	return j
}

func (j *journal) append(record []byte) error {
	e := &entry{record: record, done: make(chan struct{})}
	j.mu.Lock()
	j.waiting = append(j.waiting, e)
	j.mu.Unlock()
	j.more.Signal()
	<-e.done
	return e.err
}

func (j *journal) run() {
	defer close(j.done)
	for {
		j.mu.Lock()
		for len(j.waiting) == 0 && !j.closed {
			j.more.Wait()
		}
		batch := j.waiting
		j.waiting = nil
		j.mu.Unlock()
		if len(batch) == 0 {
			return
		}
		records := make([][]byte, len(batch))
		for i, e := range batch {
			records[i] = e.record
		}
		err := j.commit(records)
		for _, e := range batch {
			e.err = err
			close(e.done)
		}
	}
}

func (j *journal) close() error {
	j.mu.Lock()
	j.closed = true
	j.mu.Unlock()
	j.more.Signal()
	<-j.done
	return j.file.Close()
}
