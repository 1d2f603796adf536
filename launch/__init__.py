"""The front door: command line, cluster discovery, signals and exit codes."""
