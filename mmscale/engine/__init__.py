"""Two engines behind one protocol, one update step, and the arithmetic of batches and rates."""
