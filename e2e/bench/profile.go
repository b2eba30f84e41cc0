package main

import "github.com/spf13/cobra"

func profileCommand() *cobra.Command { return &cobra.Command{Use: "profile"} }
