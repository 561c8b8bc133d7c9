"""What runs and networks come to: logs, tables and curves without torch; scores and drawings of networks with it."""
