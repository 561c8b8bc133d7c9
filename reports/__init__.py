"""Results of runs and networks: logs, tables and curves, without torch; scores and drawings of networks, with it."""
