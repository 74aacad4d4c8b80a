"""The training loop: order, loss, gradient, schedule, precision, checkpoints."""
