package rpc

import (
	"errors"
	"io"

	"github.com/dayflyhq/dayfly/broker"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/wire"
	"google.golang.org/grpc"
)

// A Backup is a copy of the store as it is now: Size bytes to be read, and closed.
type Backup struct {
	io.ReadCloser
	Size int64
	Head feed.Position
}

// maxBackupData is the size of one message of a backup.
const maxBackupData = 256 << 10

// backupService is on the break-glass socket only.
type backupService struct {
	dayflyv1.UnimplementedBackupServiceServer
	*handlers
	begin func() (Backup, error) // errors that a caller may hear are refusals
}

// Backup implements dayflyv1.BackupServiceServer.
func (s *backupService) Backup(_ *dayflyv1.BackupRequest, stream grpc.ServerStreamingServer[dayflyv1.BackupResponse]) (err error) {
	if _, err := s.operator(stream.Context(), broker.ActionBackup); err != nil {
		return err
	}
	b, err := s.begin()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	s.log.InfoContext(stream.Context(), "a backup begins", "position", b.Head.String(), "bytes", b.Size)
	begin := &dayflyv1.BackupBegin{Size: uint64(b.Size), Position: wire.Position(b.Head)}
	if err := stream.Send(&dayflyv1.BackupResponse{Message: &dayflyv1.BackupResponse_Begin{Begin: begin}}); err != nil {
		return err
	}
	for {
		select {
		case <-s.serving.Done():
			return broker.ErrStoreLost
		default:
		}
		data := make([]byte, maxBackupData) // gRPC may keep a message
		n, err := io.ReadFull(b, data)
		if n > 0 {
			if err := stream.Send(&dayflyv1.BackupResponse{Message: &dayflyv1.BackupResponse_Data{Data: data[:n]}}); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return nil
		case err != nil:
			return err
		}
	}
}
