"""What every command needs: the console, durable files, run configs, checkpoints, hardware."""
