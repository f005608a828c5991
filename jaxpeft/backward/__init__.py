"""What layers keep for the backward pass, and how they are run: memory plans, loops over layers, reversible stacks."""
