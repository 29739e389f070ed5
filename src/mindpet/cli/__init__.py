"""The command line: thin, no logic that a script could want."""
