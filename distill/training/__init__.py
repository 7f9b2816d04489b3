"""Steps, micro-batches, the loop on Accelerate, states that any number of processes can continue."""
