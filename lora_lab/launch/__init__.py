"""From a command line to resolved runs: sweeps, resume, launchers, and the process that they run in."""
