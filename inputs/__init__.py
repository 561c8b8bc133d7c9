"""From image files and data sets to batches on the training device."""
