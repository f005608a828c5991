"""What a step needs on a device that need not be here: targets, plans that fit, profiles; on the training side."""
