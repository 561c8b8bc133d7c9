"""How a run trains: flags, arguments, the run directory, ranks, recipe, step, fine-tuning, the choice of a block."""
