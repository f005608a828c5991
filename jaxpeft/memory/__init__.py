"""What a training step needs, before it runs: targets, residuals, plans and profiles."""
