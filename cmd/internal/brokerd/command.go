package brokerd

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/dayflyhq/dayfly/broker/boltstore"
	"github.com/dayflyhq/dayfly/cmd/internal/config"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spf13/cobra"
)

// Command is the broker's command line, under the name it was called by.
func Command(name string) *cobra.Command {
	root := &cobra.Command{
		Use:   name,
		Short: "issue short-lived credentials, and revoke them everywhere at once",
		Long: "The dayfly broker: it issues short-lived credentials to workloads that prove their SPIFFE identity,\n" +
			"as far as policy allows, and revokes them everywhere at once.\n\n" +
			"Exit codes: 0 it did what was asked, 1 it failed, 2 the command line or the configuration is wrong.",
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.AddCommand(initCommand(name), serveCommand(name), checkCommand(name), backupCommand(name), restoreCommand(name))
	return root
}

func initCommand(name string) *cobra.Command {
	return &cobra.Command{
		Use:     "init STORE",
		Short:   "make a new, empty store",
		Long:    "Make a new, empty store. Serving never makes one: an empty store at a wrong path\nwould have forgotten every revocation.",
		Example: "  " + name + " init /var/lib/dayfly/dayfly.db",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return errors.New("name the file of the store that is to be made: " + name + " init /var/lib/dayfly/dayfly.db")
			}
			return cobra.ExactArgs(1)(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := Init(args[0], time.Now()); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "made %s\n", args[0])
			return nil
		},
	}
}

func serveCommand(name string) *cobra.Command {
	var path string
	var announce, takeOver bool
	var disregard, reason string
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "serve until told to stop",
		Long: "Serve until SIGINT or SIGTERM, then finish what was promised and stop.\n" +
			"Logs are JSON on standard error. deploy/broker.yaml explains every key of the configuration.",
		Example: "  " + name + " serve --config /etc/dayfly/broker.yaml\n  " + name + " serve --take-over",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := load(path)
			if err != nil {
				return err
			}
			if err := cfg.checkEnvironment(); err != nil {
				return config.UsageError{Err: err}
			}
			if cfg.Disregard, err = signedHead(disregard); err != nil {
				return config.UsageError{Err: fmt.Errorf("--disregard-signed-heads: %w", err)}
			}
			if cfg.TakeOver = takeOver; takeOver && cfg.Listen.BreakGlass == "" {
				return config.UsageError{Err: errors.New("--take-over asks the running broker at listen.break_glass, which the configuration lacks")}
			}
			if cfg.DisregardReason = reason; (disregard == "") != (reason == "") {
				return config.UsageError{Err: errors.New("--disregard-signed-heads and --reason go together")}
			}
			out := io.Discard
			if announce {
				out = cmd.OutOrStdout()
			}
			spareProcessor()
			collectLess()
			return Serve(cmd.Context(), cfg, out, cmd.ErrOrStderr())
		},
	}
	cmd.Flags().StringVarP(&path, "config", "c", "/etc/dayfly/broker.yaml", "configuration file (YAML)")
	cmd.Flags().BoolVar(&announce, "announce", false, "print the addresses as one line of JSON on standard output once serving")
	cmd.Flags().BoolVar(&takeOver, "take-over", false, "take over from the broker that serves: have it publish this process's signing key,\nwait until readers of the JWK set know it, tell that broker to stop, and serve;\nan ordinary start if none serves (docs/operations.md, A planned restart)")
	cmd.Flags().StringVar(&disregard, "disregard-signed-heads", "", "ERA/NUMBER: go on although the log lacks what verifiers show up to there;\nafter an operator has looked (docs/operations.md, When a broker is silent)")
	cmd.Flags().StringVar(&reason, "reason", "", "why, for the audit")
	return cmd
}

// load reads the configuration, or says all that is wrong with it.
func load(path string) (Config, error) {
	cfg := Defaults()
	if err := config.Load(path, &cfg); err != nil {
		return Config{}, config.UsageError{Err: err}
	}
	return cfg, nil
}

// signedHead reads ERA/NUMBER, as the log and readiness name a signed head; what follows
// a second slash there is its hash.
func signedHead(s string) (feed.Position, error) {
	if s == "" {
		return feed.Position{}, nil
	}
	parts := strings.SplitN(s, "/", 3)
	if len(parts) < 2 {
		return feed.Position{}, fmt.Errorf("%q is not ERA/NUMBER", s)
	}
	era, err := token.ParseEra(parts[0])
	if err != nil {
		return feed.Position{}, err
	}
	seq, err := strconv.ParseUint(parts[1], 10, 64)
	if err != nil || seq == 0 {
		return feed.Position{}, fmt.Errorf("%q is no number of a record", parts[1])
	}
	return feed.Position{Era: era, Seq: seq}, nil
}

func checkCommand(name string) *cobra.Command {
	var output, file string
	cmd := &cobra.Command{
		Use:   "check [STORE]",
		Short: "check that a store keeps its promises, or a configuration",
		Long: "Check a store that no broker has open: every parent is there, no child outlives it, the log has no gap\n" +
			"above the horizon, and its running hash holds. With --config check a configuration, as serve would read it,\n" +
			"before a broker is restarted with it.",
		Example: "  " + name + " check /var/lib/dayfly/dayfly.db\n  " + name + " check --output json /var/lib/dayfly/dayfly.db\n" +
			"  " + name + " check --config /etc/dayfly/broker.yaml",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 && file == "" {
				return errors.New("name a store, or a configuration with --config")
			}
			return cobra.MaximumNArgs(1)(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			if file != "" {
				if _, err := load(file); err != nil {
					return err
				}
			}
			if len(args) == 0 {
				return printGood(cmd.OutOrStdout(), output, file)
			}
			report, err := boltstore.Check(cmd.Context(), args[0])
			if err != nil && report.Schema == 0 {
				return err // nothing could be read
			}
			if printErr := printReport(cmd.OutOrStdout(), output, report); printErr != nil {
				return printErr
			}
			return err
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	cmd.Flags().StringVarP(&file, "config", "c", "", "configuration file (YAML) to check")
	return cmd
}

func checkOutput(output string) error {
	if output != "text" && output != "json" {
		return config.UsageError{Err: fmt.Errorf("--output is text or json, not %q", output)}
	}
	return nil
}

func printGood(w io.Writer, output, file string) error {
	if output == "json" {
		return printJSON(w, map[string]string{"config": file})
	}
	_, err := fmt.Fprintf(w, "%s is good\n", file)
	return err
}

// printReport shows what a check found; nothing for one that read nothing.
func printReport(w io.Writer, output string, r boltstore.Report) error {
	if output == "json" {
		return printJSON(w, struct {
			boltstore.Report
			Good bool `json:"good"`
		}{r, r.Good()})
	}
	fmt.Fprintf(w, "schema        %d\nhead          %s\nhorizon       %s\nrecords       %d, and %d dropped above the horizon\ngrants        %d\nobservations  %d\n",
		r.Schema, r.Head, r.Horizon, r.Records, r.Dropped, r.Grants, r.Observations)
	for _, p := range r.Problems {
		fmt.Fprintf(w, "problem       %s\n", p)
	}
	if r.More > 0 {
		fmt.Fprintf(w, "problem       and %d more\n", r.More)
	}
	if r.Good() {
		fmt.Fprintln(w, "verdict       good")
	} else {
		fmt.Fprintln(w, "verdict       NOT good: don't serve it, restore a backup")
	}
	return nil
}
