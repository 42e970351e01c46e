"""What runs a training and is no idea of VAR: options, processes, files, checkpoints."""
