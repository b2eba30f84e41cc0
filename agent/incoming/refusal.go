package incoming

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"maps"
	"net/http"
	"strconv"

	"github.com/dayflyhq/dayfly/agent/hop"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// Reasons of the guard's own, beside those of package verify. They are stable.
const (
	routeUnknown     = "ROUTE_UNKNOWN"
	methodNotAllowed = "METHOD_NOT_ALLOWED"
	pathAmbiguous    = "PATH_AMBIGUOUS"
	invalidRequest   = "INVALID_REQUEST"
	svidInvalid      = "SVID_INVALID"
	peerNotAllowed   = "PEER_NOT_ALLOWED"
	upstreamAway     = "UPSTREAM_UNREACHABLE"
)

// A refusal is a no, as HTTP and gRPC tell it.
type refusal struct {
	reason, message string
	status          int
	header          http.Header
	body            []byte
	rpc             *status.Status
}

// refuse makes a refusal of the guard's own.
func refuse(reason, message, hint string) *refusal {
	code, rpc := http.StatusForbidden, codes.PermissionDenied
	switch reason {
	case methodNotAllowed:
		code, rpc = http.StatusMethodNotAllowed, codes.Unimplemented
	case pathAmbiguous, invalidRequest:
		code, rpc = http.StatusBadRequest, codes.InvalidArgument
	case svidInvalid:
		code, rpc = http.StatusUnauthorized, codes.Unauthenticated
	case upstreamAway:
		code, rpc = http.StatusBadGateway, codes.Unavailable
	}
	body, err := json.Marshal(struct {
		Reason  string `json:"reason"`
		Message string `json:"message"`
		Hint    string `json:"hint,omitempty"`
	}{reason, message, hint})
	if err != nil {
		panic("internal error: marshalling a refusal: " + err.Error())
	}
	st := status.New(rpc, message)
	info := &errdetails.ErrorInfo{Domain: "dayfly", Reason: reason, Metadata: map[string]string{"hint": hint}}
	if detailed, err := st.WithDetails(info); err == nil {
		st = detailed
	}
	return &refusal{
		reason: reason, message: message, status: code, body: append(body, '\n'), rpc: st,
		header: http.Header{"Content-Type": {"application/json"}, "Cache-Control": {"no-store"}},
	}
}

func ambiguous(why string) *refusal {
	return refuse(pathAmbiguous, "the path can be read in several ways: "+why, "send it in its plain form: no empty or dot segments, no parameters, no needless escapes, in the case that the service has")
}

// refused is a verifier's no.
func refused(v *verify.Verifier, err error, scopes []string) *refusal {
	var r *verify.Refusal
	if !errors.As(err, &r) {
		panic("internal error: a refusal that is none: " + err.Error())
	}
	out := &refusal{reason: string(r.Reason), message: r.Message, rpc: r.GRPCStatus()}
	out.status, out.header, out.body = v.HTTPAnswer(r, scopes...)
	return out
}

// write answers a request, in gRPC's way if that is what it is.
func (r *refusal) write(w http.ResponseWriter, req *http.Request) {
	hop.Refusing(w, req)
	if !hop.IsGRPC(req) {
		maps.Copy(w.Header(), r.header)
		w.WriteHeader(r.status)
		_, _ = w.Write(r.body) // to one who has gone, perhaps
		return
	}
	h := w.Header()
	h.Set("Content-Type", "application/grpc")
	r.trailers(func(name, value string) { h.Set(name, value) })
	w.WriteHeader(http.StatusOK)
}

// trailers tells gRPC's status.
func (r *refusal) trailers(set func(name, value string)) {
	set("Grpc-Status", strconv.Itoa(int(r.rpc.Code())))
	set("Grpc-Message", hop.GRPCMessage(r.rpc.Message()))
	if b, err := proto.Marshal(r.rpc.Proto()); err == nil {
		set("Grpc-Status-Details-Bin", base64.RawStdEncoding.EncodeToString(b))
	}
}
