"""What only a device can say, measured by one command: `python -m experiments.on_device`; see __main__.py."""
